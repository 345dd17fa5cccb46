"""A language model's run, put to use: what it writes, its samples, exported and merged."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import plait
from conftest import save_language_model
from plait.cli.main import _print_summary, main
from plait.config import Config, Machine
from plait.engines.job import prepare
from plait.events import Evaluated
from plait.experiments.benchmark import weighted_hits
from plait.runs.answers import answer
from plait.runs.run import Run
from plait.runs.run_folder import load_samples
from plait.runs.samples import last_number, likeness
from plait.runs.trained import export, merge

QUESTIONS = ["Is it good?", "Is the film bad?"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two clients of a tiny Llama, trained far enough to write otherwise than the base."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [
        {"messages": [{"role": "user", "content": f"Is it {i}?"},
                      {"role": "assistant", "content": ("yes", "no")[i % 2]}]}
        for i in range(40)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = Config(
        task="chat", train_file=str(folder / "rows.jsonl"), options="yes,no", clients=2, rounds=2,
        backbone=str(save_language_model(folder / "model")), local_steps=3, batch_size=4, rank=4,
        lr=0.05, topology="complete", method="dec-lora", target_modules="all-linear",
        generate_rows=3, max_new_tokens=6,
    )  # fmt: skip
    run = Run(config, folder / "run")
    list(run)
    return run


def generated(model, tokenizer, text):
    """What transformers generates."""
    turns = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    prompt.pop("token_type_ids", None)
    ends = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|end|>"])
    ids = model.generate(
        **prompt, do_sample=False, max_new_tokens=6, eos_token_id=ends, pad_token_id=ends[1]
    )
    new = ids[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def test_the_summary_has_perplexity_and_the_base_without_adapter(run):
    first, *_, last = [event for event in run.events if isinstance(event, Evaluated)]
    assert run.summary["metric"] == "option-accuracy"
    assert run.summary["perplexity_client_mean"] == pytest.approx(math.exp(sum(last.losses) / 2))
    assert run.summary["perplexity_base"] == pytest.approx(math.exp(first.averaged_loss))
    assert run.summary["accuracy_base"] == first.averaged_score
    assert run.summary["perplexity_client_mean"] < run.summary["perplexity_base"]


def test_the_last_line_has_the_base_beside_it(run, capsys):
    _print_summary(run.summary, Path("a-run"))
    said = capsys.readouterr().out
    assert f"(base {run.summary['perplexity_base']:.4g})" in said
    assert "majority" not in said


def test_the_likeliest_option_is_that_of_the_summed_log_probabilities(run):
    model, tokenizer = run.model("mean"), run.tokenizer()
    task = plait.data.tasks.load_task(run.config)
    hits = []
    for (text,) in task.test.texts:
        row, sums = json.loads(text), []
        for option in row["options"]:
            prompt = tokenizer.apply_chat_template(
                row["messages"][:1], add_generation_prompt=True, tokenize=False
            )
            asked = tokenizer(option + "<|im_end|>", return_tensors="pt").input_ids
            ids = torch.cat([tokenizer(prompt, return_tensors="pt").input_ids, asked], dim=1)
            with torch.no_grad():
                odds = model(input_ids=ids).logits.log_softmax(-1)[0, -asked.shape[1] - 1 : -1]
            sums.append(float(odds.gather(1, asked.T).sum()))
        right = row["options"].index(row["messages"][1]["content"])
        hits.append(sums.index(max(sums)) == right)
    assert run.summary["accuracy_averaged_model"] == pytest.approx(sum(hits) / len(hits))


def test_the_last_evaluation_says_on_how_many_tokens_of_each_row_clients_were_right(run, tmp_path):
    rows = [{"prompt": f"Is it {i}?", "completion": "yes " * (1 + i % 3)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    again = Run(
        dataclasses.replace(
            run.config, train_file=str(tmp_path / "rows.jsonl"), options=None, generate_rows=0
        )
    )
    *_, last = [event for event in again if isinstance(event, Evaluated)]
    tokens, models = again._engine.job.held_out, [again.model(k) for k in range(2)]
    hits, asked = [], []
    for i in range(len(tokens)):
        whole = slice(*tokens.offsets[i : i + 2])
        ids, mask = torch.from_numpy(tokens.ids[whole]).long(), tokens.asked[whole][:-1]
        with torch.no_grad():
            called = [model(input_ids=ids[None]).logits[0, :-1].argmax(-1) for model in models]
        hits.append(sum(int((one == ids[1:])[mask].sum()) for one in called))
        asked.append(int(mask.sum()))
    assert (last.hits, last.asked) == (hits, asked)
    assert len(set(asked)) > 1
    assert 0 < sum(hits) < 2 * sum(asked)
    assert sum(weighted_hits(last)) / len(asked) == pytest.approx(sum(last.scores))


def test_samples_are_what_base_and_averaged_model_generate(run):
    samples = load_samples(run.folder.path)
    assert len(samples) == 3
    tokenizer = run.tokenizer()
    for one in samples:
        assert one["before"] == generated(run.base(), tokenizer, one["prompt"])
        assert one["after"] == generated(run.model("mean"), tokenizer, one["prompt"])
        assert one["reference"] in ("yes", "no")
    assert any(one["before"] != one["after"] for one in samples)
    assert run.summary["exact_match"] == likeness(samples)["exact_match"]


def test_a_run_that_was_stopped_ends_as_an_unbroken_one(run, tmp_path):
    left = Run(run.config, tmp_path / "run", machine=Machine(save_every=1))
    list(itertools.islice(left, 3))  # to the end of the first round
    resumed = Run(run.config, tmp_path / "run", resume=True)
    assert [said(event) for event in resumed] == [said(event) for event in run.events]
    names = [f"adapters/{name}/adapter_model.safetensors" for name in ("client-0", "mean")]
    for name in (*names, "samples.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (run.folder.path / name).read_bytes()


def said(event):
    return {key: value for key, value in vars(event).items() if not key.endswith("seconds")}


def test_it_answers_texts(run, tmp_path, capsys):
    folder = str(run.folder.path)
    answers = run.predict(QUESTIONS)
    assert answers == [generated(run.model("mean"), run.tokenizer(), q) for q in QUESTIONS]
    assert main(["predict", folder, "--text", QUESTIONS[0], "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == answers[0] + "\n"
    rows = [{"text": QUESTIONS[0]}, {"messages": [{"role": "user", "content": QUESTIONS[1]}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out.csv"
    args = ["--file", str(tmp_path / "rows.jsonl"), "--out", str(out), "--max-new-tokens=6"]
    assert main(["predict", folder, *args]) == 0
    with out.open(newline="") as lines:
        assert list(csv.reader(lines)) == [
            ["prompt", "answer"], *map(list, zip(QUESTIONS, answers, strict=True))
        ]  # fmt: skip


def test_an_export_is_loaded_by_peft_alone(run, tmp_path):
    export(run.folder.path, None, tmp_path / "mean")
    settings = json.loads((tmp_path / "mean" / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM"
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mean").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mean")
    assert tokenizer.chat_template == run.tokenizer().chat_template
    ids = tokenizer(QUESTIONS[1], return_tensors="pt").input_ids
    ours, _ = plait.load(tmp_path / "mean")
    with torch.no_grad():
        expected = run.model("mean")(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        base = run.base()(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(base, expected, atol=0.1)


def test_a_merged_model_writes_the_samples(run, tmp_path):
    merge(run.folder.path, "mean", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    samples = load_samples(run.folder.path)
    prompts = [one["prompt"] for one in samples]
    assert answer(model, tokenizer, prompts, 6) == [one["after"] for one in samples]


def test_prompts_and_references_are_compared():
    assert last_number("9 eggs at 2 make 18.\n#### 1,018 in all, not 5") == 1018
    assert last_number("so -3.5 remain") == -3.5
    assert last_number("none") is None
    samples = [
        {"before": "It is 17", "after": "#### 18", "reference": "9 * 2 = 18 #### 18"},
        {"before": "2", "after": " 3 ", "reference": "3"},
    ]
    found = likeness(samples)
    assert (found["exact_match"], found["exact_match_base"]) == (0.5, 0)
    assert (found["numeric_match"], found["numeric_match_base"]) == (1, 0)
    assert "numeric_match" not in likeness([{"before": "", "after": "", "reference": "x"}])


def test_seeds_share_one_language_model(run):
    first, other = (prepare(dataclasses.replace(run.config, seed=seed)) for seed in (0, 1))
    assert first.backbone is other.backbone
    assert first.train is other.train


@pytest.mark.parametrize("settings", [{"generate_rows": 1}, {"options": "a,b"}])
def test_only_language_models_write(settings):
    with pytest.raises(ValueError, match="--options and --generate-rows are for language models"):
        prepare(Config(task="movies", **settings))
