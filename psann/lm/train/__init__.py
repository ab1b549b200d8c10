"""The command path of older documents: ``python -m psann.lm.train.cli``."""
