"""One report is hidden, inside the block only, and nothing else ever is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
from safetensors.torch import save_file
from transformers import UMT5EncoderModel
from umt5_layouts import EMBED, true_weights, write_layout

from test_umt5_weights import REPORT
from wan_distill.umt5.silence import LOADERS, is_tied_weight_report, silence_tied_weight_report

SENTENCE = (
    "Some weights of UMT5EncoderModel were not initialized from the model checkpoint at x and are "
    f"newly initialized: ['{EMBED}']\nYou should probably TRAIN this model"
)
NORM = "encoder.final_layer_norm.weight"


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Every message that reaches the log of the loaders."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    for name in LOADERS:
        logging.getLogger(name).addHandler(handler)
    yield messages
    for name in LOADERS:
        logging.getLogger(name).removeHandler(handler)


def report(*missing: str) -> str:
    """The report of the installed transformers on these missing keys."""
    loading_report = pytest.importorskip("transformers.utils.loading_report")
    info = loading_report.LoadStateDictInfo(set(missing), set(), set(), [], {}, set())
    prelude = "\x1b[1mUMT5EncoderModel LOAD REPORT\x1b[0m from: somewhere\n"
    return prelude + info.create_loading_report()


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("message", [REPORT, SENTENCE])
def test_the_report_is_hidden_inside_the_block_only(logged, name, message):
    logger = logging.getLogger(name)
    with silence_tied_weight_report():
        logger.warning(message)
    assert logged == []
    logger.warning(message)
    assert logged == [message]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_installed_versions_report_is_recognised(monkeypatch, is_terminal):
    """On a terminal it has colours."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    assert is_tied_weight_report(report(EMBED))
    assert not is_tied_weight_report(report(EMBED, NORM))


@pytest.mark.parametrize(
    "others",
    [
        (NORM,),
        ("encoder.block.0.layer.0.layer_norm.weight",),
        # one row for both: encoder.block.{0, 1}.layer.0.layer_norm.weight
        tuple(f"encoder.block.{i}.layer.0.layer_norm.weight" for i in (0, 1)),
    ],
)
def test_a_report_of_another_missing_key_is_shown(logged, others):
    with silence_tied_weight_report():
        logging.getLogger(LOADERS[0]).warning(report(EMBED, *others))
        logging.getLogger(LOADERS[0]).warning(report(*others))
    assert len(logged) == 2


@pytest.mark.parametrize(
    "message",
    [
        REPORT.replace("UMT5EncoderModel", "BertModel"),
        REPORT.replace("| MISSING", "| MISMATCH"),
        SENTENCE.replace(f"'{EMBED}'", f"'{EMBED}', '{NORM}'"),
        SENTENCE.replace(EMBED, NORM),
        f"something else about {EMBED}",
    ],
)
def test_every_other_message_is_shown(logged, message):
    with silence_tied_weight_report(), pytest.warns(UserWarning) as caught:
        logging.getLogger(LOADERS[0]).warning(message)
        warnings.warn(message, stacklevel=1)
    assert logged == [message] and [str(w.message) for w in caught] == [message]


def test_the_sentence_is_hidden_as_a_warning_too():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with silence_tied_weight_report():
            warnings.warn(SENTENCE, stacklevel=1)
        assert caught == []
        warnings.warn(SENTENCE, stacklevel=1)
    assert len(caught) == 1


def test_a_block_inside_a_block_does_not_end_the_outer_one(logged):
    with silence_tied_weight_report():
        with silence_tied_weight_report():
            pass
        logging.getLogger(LOADERS[0]).warning(REPORT)
    assert logged == []
    logging.getLogger(LOADERS[0]).warning(REPORT)
    assert logged == [REPORT]


def test_everything_is_restored_after_an_error():
    def state() -> tuple[object, ...]:
        filters = [list(logging.getLogger(name).filters) for name in LOADERS]
        return filters, list(warnings.filters), warnings.showwarning

    before = state()
    with pytest.raises(RuntimeError), silence_tied_weight_report():
        assert state() != before
        raise RuntimeError
    assert state() == before


def test_verbose_shows_everything(logged):
    with silence_tied_weight_report(verbose=True):
        logging.getLogger(LOADERS[0]).warning(REPORT)
    assert logged == [REPORT]


def test_a_real_load_with_another_missing_key_is_reported(tmp_path, logged):
    folder = write_layout("shared only", tmp_path / "encoder")
    weights = true_weights()
    del weights[NORM]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with silence_tied_weight_report():
        UMT5EncoderModel.from_pretrained(folder)
    assert any(NORM in message for message in logged)
