"""``regraft record``: from a folder and a text to a trace, and what it says of wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from regraft.cli.main import app
from regraft.solvers.placement.readers.native import read_trace
from tests.regraft.test_record import mixtral


def invoke(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral folder with a tokenizer of sixty words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("mixtral")
    mixtral().save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(60)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A text of 200 words."""
    path = tmp_path / "texts.txt"
    path.write_text(" ".join(f"w{7 * number % 60}" for number in range(200)), encoding="utf-8")
    return path


def test_texts_become_a_trace(folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.npz"
    done = invoke("record", folder, "--texts", texts, "-o", out, "--length", "16", "--batch", "2", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["num_experts"], facts["top_k"], facts["tokens"]) == (5, 2, 192)
    trace = read_trace(out)
    assert trace.layer_ids == (0, 1, 2) and len(trace.batches) == 6 and trace.has_tokens
    assert all((batch.counts.sum(-1) == 64).all() for batch in trace.batches)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--texts": "missing.txt"}, "cannot be read"),
        ({"--length": "500"}, "200 tokens"),
        ({"-o": "trace.txt"}, "ends in .npz or .safetensors"),
        ({"--tokenizer": "nowhere"}, "no folder with a tokenizer"),
    ],
)
def test_wrong_input_is_one_sentence(
    folder: Path, texts: Path, tmp_path: Path, change: dict[str, str], said: str
) -> None:
    options = {"--texts": texts, "-o": tmp_path / "trace.npz", "--length": "16"}
    options |= {name: value if value.isdecimal() else tmp_path / value for name, value in change.items()}
    done = invoke("record", folder, *(part for pair in options.items() for part in pair))
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split()) and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("trace*"))
