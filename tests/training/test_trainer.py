"""The Trainer: the weights of fit to the last digit, callbacks, stop, evaluate and save."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm import psannLM, psannLMDataPrep
from psannlm.config.train import TrainConfig
from psannlm.data.dataset import LMDataset
from psannlm.errors import ConfigError, TokenizerError, TrainingError
from psannlm.training.callbacks import Callback, SaveEvent, StepEvent, TrainResult, ValidationEvent
from psannlm.training.trainer import Trainer

SETTINGS: dict[str, Any] = {"max_steps": 4, "batch_tokens": 64, "lr": 1e-2, "amp": "fp32", "device": "cpu"}


class Recorder(Callback):
    """Keeps every event with the weights of that moment."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self.model = model
        self.events: list[Any] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step(self, event: StepEvent) -> None:
        self.events.append(event)
        torch.rand(100)
        if self.model is not None:
            self.weights.append({name: p.detach().clone() for name, p in self.model.named_parameters()})

    def on_validation(self, event: ValidationEvent) -> None:
        self.events.append(event)

    def on_save(self, event: SaveEvent) -> None:
        assert (event.folder / "model.safetensors").is_file()
        self.events.append(event)

    def on_end(self, result: TrainResult) -> None:
        self.events.append(result)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def data(tiny_texts: list[str]) -> psannLMDataPrep:
    return psannLMDataPrep(tiny_texts, tokenizer="simple", max_length=16, val_split=0.2, vocab_size=300)


@pytest.fixture(autouse=True)
def _quick(_no_curve: None) -> None:
    """No curve is drawn."""


def small(data: psannLMDataPrep, **settings: Any) -> psannLM:
    return psannLM(d_model=16, n_layers=1, n_heads=2, vocab_size=data.vocab_size, dropout=0.1, **settings)


def config(folder: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(checkpoint_dir=str(folder), **{**SETTINGS, **settings})


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_fit_matches_trainer(data: psannLMDataPrep, tmp_path: Path) -> None:
    seen, heard = Recorder(), Recorder()
    fitted = small(data).fit(data, verbose=False, callbacks=[seen], **SETTINGS)
    network = psannLM(**_arguments(data), max_seq_len=16).model
    trainer = Trainer(network, data.dataset, data.val_dataset, config(tmp_path), callbacks=[heard])
    result = trainer.train()
    assert result is trainer.result
    assert same(network, fitted.model)
    assert fitted.result is not None
    assert (result.train_loss, result.best) == (fitted.result.train_loss, fitted.result.best)
    assert not network.training
    for events in (seen, heard):
        steps = events.of(StepEvent)
        assert [event.step for event in steps] == [1, 2, 3, 4]
        assert steps[-1].loss == result.train_loss
        assert {event.total_steps for event in steps} == {4}
        assert steps[-1].tokens == result.tokens
        assert not any(event.is_skipped for event in steps)
        assert all(event.grad_norm > 0 and event.lr > 0 for event in steps)
    assert [e.loss for e in seen.of(StepEvent)] == [e.loss for e in heard.of(StepEvent)]


def _arguments(data: psannLMDataPrep) -> dict[str, Any]:
    return {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": data.vocab_size, "dropout": 0.1}


@pytest.mark.slow
def test_callbacks_run_in_order_with_current_weights(data: psannLMDataPrep, tmp_path: Path) -> None:
    model = small(data)
    recorder = Recorder(model.model)
    trainer = Trainer(
        model, data, config=config(tmp_path, save_interval_steps=2, eval_interval_steps=2), callbacks=[recorder]
    )
    result = trainer.train()
    kinds = [type(event).__name__ for event in recorder.events]
    half = ["StepEvent", "StepEvent", "ValidationEvent", "SaveEvent"]
    assert kinds == [*half, *half, "TrainResult"]
    assert recorder.events[-1] is result is model.result
    assert [event.step for event in recorder.of(ValidationEvent)] == [2, 4]
    assert [event.folder for event in recorder.of(SaveEvent)] == [tmp_path / f"step_0000000{n}" for n in (2, 4)]
    saved = psannLM.load(tmp_path / "step_00000002")
    assert all(torch.equal(p, recorder.weights[1][name]) for name, p in saved.model.named_parameters())
    assert isinstance(model.generate("The", max_new_tokens=4), str)


@pytest.mark.slow
def test_trainer_stop_ends_step_and_train_resumes(data: psannLMDataPrep, tmp_path: Path) -> None:
    class Stopper(Callback):
        def on_step(self, event: StepEvent) -> None:
            if event.step == 2:
                trainer.stop()

    straight, stopped = small(data), small(data)
    Trainer(straight, data, config=config(tmp_path / "straight")).train()
    trainer = Trainer(stopped, data, config=config(tmp_path / "stopped"), callbacks=[Stopper()])
    assert trainer.train().steps == 2
    assert not same(straight.model, stopped.model)
    assert trainer.train().steps == 4
    assert same(straight.model, stopped.model)


def test_callback_sees_skipped_step(data: psannLMDataPrep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from psannlm.training import loop

    real, n_calls = loop.train_step, 0

    def spoil(*args: Any, **settings: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        return real(*args, **{**settings, **({"label_smoothing": float("nan")} if n_calls == 2 else {})})

    monkeypatch.setattr(loop, "train_step", spoil)
    recorder = Recorder()
    Trainer(small(data), data, config=config(tmp_path, on_nonfinite="skip"), callbacks=[recorder]).train()
    assert [event.is_skipped for event in recorder.of(StepEvent)] == [False, True, False, False]


@pytest.mark.slow
def test_callback_error_ends_the_run(data: psannLMDataPrep, tmp_path: Path) -> None:
    class Broken(Callback):
        def on_step(self, event: StepEvent) -> None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Trainer(small(data), data, config=config(tmp_path), callbacks=[Broken()]).train()
    model = psannLM(d_model=16, n_layers=1, n_heads=2)
    with pytest.raises(KeyError, match="mine"):
        model.fit(data, verbose=False, callbacks=[Broken()], **SETTINGS)
    # Nothing of the failed fit stays: the vocabulary is still open.
    assert model.vocab_size is None


def test_trainer_evaluate_and_save_use_current_model(data: psannLMDataPrep, tmp_path: Path) -> None:
    model = small(data)
    trainer = Trainer(model, data, config=config(tmp_path / "run"))
    before = trainer.evaluate()
    result = trainer.train()
    after = trainer.evaluate()
    assert result.best is not None
    assert after.loss == pytest.approx(result.best["loss"]) != pytest.approx(before.loss)
    assert trainer.evaluate(data.val_dataset) == after
    assert trainer.evaluate(data).n_labels == data.dataset.n_labels
    for path in (tmp_path / "a.safetensors", tmp_path):
        loaded = psannLM.load(trainer.save(path))
        assert same(loaded.model, trainer.model)
        assert loaded.tokenizer is not None
    unheld = Trainer(model, data.dataset, config=config(tmp_path / "other"))
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        unheld.evaluate()


@pytest.mark.slow
def test_fit_accepts_datasets(data: psannLMDataPrep) -> None:
    one = small(data).fit(data, verbose=False, **SETTINGS)
    other = small(data).fit(data.dataset, data.val_dataset, verbose=False, **SETTINGS)
    assert one.result is not None
    assert other.result is not None
    assert same(one.model, other.model)
    assert one.result.best == other.result.best


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"model": "waveresnet"}, TypeError, "model is a str; give a psannLM"),
        ({"train_data": ["a text"]}, TypeError, "train_data is a list; give psannLMDataPrep"),
        ({"val_data": "a text"}, TypeError, "val_data is a str"),
        ({"config": {"epochs": 1}}, TypeError, "config is a dict; give a TrainConfig"),
        ({"callbacks": [Callback]}, TypeError, r"the class Callback; give an object: Callback\(\)"),
        ({"callbacks": [print]}, TypeError, "has no on_step, on_validation, on_save, on_end"),
        ({"config": TrainConfig(batch_tokens=8)}, ConfigError, "one window of data.max_length 16"),
    ],
)
def test_trainer_names_wrong_arguments(
    arguments: dict[str, Any], kind: type[Exception], said: str, data: psannLMDataPrep
) -> None:
    with pytest.raises(kind, match=said):
        Trainer(**{"model": small(data), "train_data": data, **arguments})


def test_trainer_refuses_other_tokenizers(data: psannLMDataPrep, tiny_texts: list[str]) -> None:
    other = psannLMDataPrep(tiny_texts, tokenizer="tokenizers", max_length=16, vocab_size=300)
    model = small(data)
    for val_data in (other, other.dataset):
        with pytest.raises(TokenizerError, match=f"val_data has tokenizer {other.tokenizer.fingerprint[:12]}"):
            Trainer(model, data, val_data)
    with pytest.raises(TokenizerError, match="data has tokenizer"):
        Trainer(model, data).evaluate(other)
    trained = copy.copy(model)
    trained.tokenizer = other.tokenizer
    with pytest.raises(TokenizerError, match="the model was trained with tokenizer"):
        Trainer(trained, data)
    bare = LMDataset(data.dataset.store, 16, pad_id=0)
    with pytest.raises(TypeError, match="has no tokenizer or no configuration"):
        Trainer(model, bare)
    with pytest.raises(TypeError, match="has no tokenizer or no configuration"):
        model.fit(bare)


def test_trainer_passes_training_errors(data: psannLMDataPrep, tmp_path: Path) -> None:
    model = small(data)
    with torch.no_grad():
        model.model.embedding.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        Trainer(model, data, config=config(tmp_path)).train()
