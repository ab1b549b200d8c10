"""A corpus of any size to a folder of token shards."""
