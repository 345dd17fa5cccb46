"""What a run has trained, put to use: asked, exported as a whole, merged, loaded by others."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import plait
from conftest import WORDS, save_encoder
from fake_folders import write_run
from plait.cli.main import main
from plait.config import Config
from plait.runs.model_card import model_card
from plait.runs.run import Run
from plait.runs.run_folder import load_events
from plait.runs.trained import Card, export, find, merge, predict

TEXTS = ["the film was good", "bad", "what a great question is the question"]
KINDS = {"mean-pooled": ("x", "y"), "bert": ("x", "y"), "regression": ()}


def write_rows(folder, labels, count):
    rng = np.random.default_rng(0)
    for name in ("train", "dev"):
        rows = [f"{' '.join(rng.choice(WORDS, 5))} {i},{labels(i)}" for i in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["question,kind", *rows]) + "\n")


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """A finished run: its object, its folder, and the names of its labels."""
    folder = tmp_path_factory.mktemp(request.param)
    regression = request.param == "regression"
    write_rows(folder, (lambda i: i / 7) if regression else (lambda i: "xy"[i % 2]), 40)
    model = save_encoder("bert" if regression else request.param, folder / "model")
    config = Config(
        task="file", train_file=str(folder / "train.csv"), dev_file=str(folder / "dev.csv"),
        text_columns="question", label_column="kind", backbone=str(model), label_skew="iid",
        objective="regression" if regression else "classification", clients=2, rounds=1,
        local_steps=2, batch_size=4, rank=2, topology="complete", max_length=6, lr=0.1,
    )  # fmt: skip
    run = Run(config, folder / "run")
    list(run)
    return run, folder / "run", KINDS[request.param]


def numbers_of(answers):
    return np.array([list(one.probabilities.values()) or [one.score] for one in answers])


def test_a_run_says_what_its_model_makes_of_texts(trained):
    run, folder, names = trained
    answers = run.predict(TEXTS, client=1)
    model = PeftModel.from_pretrained(plait.load_base(folder), folder / "adapters/client-1").eval()
    for text, answer in zip(TEXTS, answers, strict=True):
        batch = run.tokenizer()([text], truncation=True, max_length=6, return_tensors="pt")
        with torch.no_grad():
            (logits,) = model(**batch).logits
        expected = logits.softmax(0) if names else logits
        np.testing.assert_allclose(numbers_of([answer])[0], expected.numpy(), atol=1e-5)
        if names:
            assert answer.label == names[int(expected.argmax())]
            assert answer.score == answer.probabilities[answer.label]


@pytest.mark.parametrize("trained", ["bert"], indirect=True)
@pytest.mark.parametrize("scale", ["rslora", "sfed"])
def test_whatever_the_scale_peft_has_the_same(trained, tmp_path, scale):
    config = dataclasses.replace(trained[0].config, scale=scale, clients=3, rank=3)
    run = Run(config, tmp_path / "run")
    list(run)
    model = PeftModel.from_pretrained(
        plait.load_base(run.folder.path), run.folder.path / "adapters/client-2"
    ).eval()
    (config_of_peft,) = model.peft_config.values()
    factor = run._engine.job.backbone.layout.scale
    assert config_of_peft.lora_alpha / 3 == factor
    assert factor == pytest.approx(16 * (1 if scale == "sfed" else 3**-0.5))
    batch = run.tokenizer()(TEXTS, padding=True, max_length=6, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits.softmax(1).numpy()
        with model.disable_adapter():
            assert np.abs(model(**batch).logits.softmax(1).numpy() - expected).max() > 1e-4
    np.testing.assert_allclose(numbers_of(run.predict(TEXTS, client=2)), expected, atol=1e-5)


def test_an_exported_folder_is_all_that_is_needed(trained, tmp_path):
    run, folder, names = trained
    export(folder, 1, tmp_path / "one")
    with pytest.raises(ValueError, match="already exists"):
        export(folder, 1, tmp_path / "one")
    settings = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == run.config.backbone
    card = Card.read(tmp_path / "one" / "plait.json")
    assert (card.label_names, card.text_columns, card.max_length) == (names, ("question",), 6)
    hidden = folder.with_name("hidden")
    shutil.move(folder, hidden)
    try:
        model, tokenizer = plait.load(tmp_path / "one")
        found = predict(model, tokenizer, TEXTS, names, 6)
        base = plait.load_base(tmp_path / "one")
    finally:
        shutil.move(hidden, folder)
    assert found == run.predict(TEXTS, client=1)
    assert base.config.problem_type == ("single_label_classification" if names else "regression")
    if names:
        assert list(base.config.id2label.values()) == list(names)


@pytest.mark.parametrize("client", [1, None])
def test_an_exported_folder_has_a_model_card_that_hubs_read(trained, client, tmp_path):
    run, folder, _ = trained
    export(folder, client, tmp_path / "one")
    card = ModelCard.load(tmp_path / "one" / "README.md")
    assert card.data.base_model is None  # a folder of this machine is nothing to give away
    assert str(folder.parent) not in card.content
    assert "`model`, a model from a folder" in card.text
    assert card.data.library_name == "peft"
    assert {"lora", run.config.method} <= set(card.data.tags)
    if client is None:
        (result,) = card.data.eval_results
        assert result.metric_value == round(run.summary["accuracy_averaged_model"], 4)
    else:
        assert card.data.eval_results is None
    worst = f"| worst client | {run.summary['accuracy_client_min']:.3f} |"
    assert worst in card.text
    assert "without differential privacy" in card.text


@pytest.mark.parametrize("trained", ["regression"], indirect=True)
def test_the_card_of_the_best_round_has_its_figures(trained, tmp_path):
    config = dataclasses.replace(
        trained[0].config, rounds=9, stop_after=1, eval_every=1, eval_split="validation", lr=0.5
    )
    run = Run(config, tmp_path / "run")
    list(run)
    best = run.summary["best_round"]
    assert best + 1 < run.summary["rounds_done"]
    last = run.summary["rounds_done"], run.summary["accuracy_client_mean"]
    first = best + 1, run.summary["best_accuracy_client_mean"]
    figures = {"": last, "adapters/client-1": last, "best": first, "best/client-1": first}
    for number, (place, (rounds, figure)) in enumerate(figures.items()):
        out, again = tmp_path / f"out{number}", tmp_path / f"again{number}"
        export(tmp_path / "run" / place, 1, out)
        text = (out / "README.md").read_text()
        assert f"| mean of the clients' own adapters | {figure:.3f} |" in text
        assert f"{rounds} of 2 steps" in text
        assert "This is client-1's own." in text
        export(out, 1, again)
        assert (again / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("backbone", "base", "said"),
    [
        ("minilm", None, "adapter for `minilm`, a model that plait has from a package"),
        ("org/name", "org/name", "adapter for [org/name](https://huggingface.co/org/name)"),
    ],
)
def test_a_model_card_links_a_base_that_is_on_the_hub_alone(backbone, base, said, tmp_path):
    run = write_run(tmp_path / "run", Config(clients=4, rounds=2, backbone=backbone))
    text = model_card(run, load_events(run)[0], "mean", "mine")
    assert ModelCard(text).data.base_model == base
    assert said in text


def test_an_adapter_within_a_run_is_found_by_its_path(trained):
    _, folder, _ = trained
    found = find(folder / "adapters" / "client-0")
    assert found.card == find(folder).card
    assert found.folder == folder / "adapters" / "client-0"


def test_a_merged_model_is_one_that_transformers_loads(trained, tmp_path):
    run, folder, names = trained
    out = tmp_path / "merged"
    if find(folder).card.pooling == "mean":
        with pytest.raises(ValueError, match="`plait export` writes a folder that"):
            merge(folder, "mean", out)
        assert not out.exists()
        return
    merge(folder, "mean", out)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    found = predict(model, tokenizer, TEXTS, names, 6)
    np.testing.assert_allclose(numbers_of(found), numbers_of(run.predict(TEXTS)), atol=1e-5)
    said = pipeline("text-classification", model=str(out), device="cpu")(TEXTS[1])
    expected = run.predict(TEXTS[1:2])[0]
    assert said[0]["score"] == pytest.approx(expected.score, abs=1e-5)
    if names:
        assert said[0]["label"] == expected.label


def test_a_base_goes_into_a_pipeline(trained):
    run, folder, names = trained
    base = plait.load_base(folder)
    (said,) = pipeline(
        "text-classification", model=base, tokenizer=run.tokenizer(), device="cpu"
    )(TEXTS[1])  # fmt: skip
    assert said["label"] in (names or ("LABEL_0",))


def test_files_are_as_readable_as_the_umask_says(trained):
    _, folder, _ = trained
    mask = os.umask(0)
    os.umask(mask)
    for file in (folder / "adapters/mean/adapter_model.safetensors", folder / "events.jsonl"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_federations_leave_is_read_too(trained, tmp_path):
    _, folder, _ = trained
    shutil.copytree(folder, tmp_path / "trial")
    peer = tmp_path / "trial" / "federation" / "peer-0" / "out"
    peer.mkdir(parents=True)
    (tmp_path / "trial" / "events.jsonl").rename(peer / "events.jsonl")
    assert find(tmp_path / "trial") == dataclasses.replace(
        find(folder), folder=tmp_path / "trial" / "adapters" / "mean"
    )
    plait.load_base(tmp_path / "trial")


def test_mixed_rows_and_other_folders_are_refused(trained, tmp_path):
    run, folder, _ = trained
    with pytest.raises(ValueError, match="Some texts are pairs"):
        run.predict(["one", ("two", "three")])
    with pytest.raises(ValueError, match="is not a run folder"):
        find(tmp_path)
    with pytest.raises(ValueError, match="has no adapter client-9; it has: client-0"):
        find(folder, 9)
    assert run.predict([]) == []


# -- the commands


def test_texts_and_files_are_labelled_from_the_command_line(trained, tmp_path, capsys):
    run, folder, names = trained
    assert main(["predict", str(folder), *(f"--text={text}" for text in TEXTS)]) == 0
    printed = list(csv.reader(capsys.readouterr().out.splitlines()))
    rows = tmp_path / "rows.csv"
    rows.write_text("other,question\n" + "".join(f"1,{text}\n" for text in TEXTS))
    out = tmp_path / "deep" / "scores.csv"
    assert main(["predict", str(folder), f"--file={rows}", f"--out={out}"]) == 0
    assert "3 rows" in capsys.readouterr().out
    written = list(csv.reader(out.read_text().splitlines()))
    assert written[0] == ["question", *printed[0][1:]]
    assert written[1:] == printed[1:]
    found = [[float(cell) for cell in row[2 if names else 1 :]] for row in written[1:]]
    np.testing.assert_allclose(found, numbers_of(run.predict(TEXTS)), atol=1e-5)
    text = rows.read_text()
    assert main(["predict", str(folder), f"--file={rows}", f"--out={rows}"]) == 1
    assert "take another --out" in capsys.readouterr().err
    assert rows.read_text() == text
    rows.write_bytes(f"{text}1,caf\u00e9\n1,\n".encode("cp1252"))
    assert main(["predict", str(folder), f"--file={rows}"]) == 1
    assert "pass --encoding, such as cp1252" in capsys.readouterr().err
    how = ["--encoding=cp1252", "--delimiter=,", "--skip-bad-rows"]
    assert main(["predict", str(folder), f"--file={rows}", *how]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Give texts: --text"),
        (["--text=a", "--file=rows.csv"], "Give texts: --text"),
        (["--file=nowhere.csv"], "There is no file nowhere.csv"),
        (["--text=a", "--client=first"], "give a client's number, or mean"),
    ],
)
def test_what_cannot_be_asked_is_said(capsys, tmp_path, args, message):
    assert main(["predict", str(tmp_path), *args]) == 1
    assert message in capsys.readouterr().err


def test_pairs_come_from_files(trained, tmp_path, capsys):
    _, folder, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    values = json.loads((folder / "config.json").read_text()) | {"text_columns": "first, second"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    assert main(["predict", str(tmp_path / "run"), "--text=a"]) == 1
    assert "--file with the columns first and second" in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"first": "good", "second": "bad"}\n{"first": "a", "second": "the"}\n')
    assert main(["predict", str(tmp_path / "run"), f"--file={rows}"]) == 0
    printed = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert printed[0][:2] == ["first", "second"]
    assert len(printed) == 3
