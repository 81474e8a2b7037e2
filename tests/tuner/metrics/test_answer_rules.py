"""GenEval 2, T2I-CompBench and OneIG: rules against code of our own on random answers, files, and a model that answers."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import gmean

from stagevar.errors import UsageError
from tests.fakes import metric_models
from tuner.evalkit.command import main
from tuner.metrics import create
from tuner.metrics.answer_rules import read_geneval2_answers, score_compbench, score_geneval2, score_oneig
from tuner.metrics.answers_file import Question
from tuner.metrics.vlm import TransformersJudge, spellings_of

SKILLS = ("object", "attribute", "count", "position", "verb")


def random_case(seed, values):
    """(items of questions with parents, answers per item, image and question), drawn evenly."""
    rng = random.Random(seed)
    questions, given, answers = [], {}, {}
    for item in range(rng.randint(1, 6)):
        count, atoms = rng.randint(1, 7), rng.randint(3, 10)
        for number in range(1, count + 1):
            parents = tuple(rng.sample(range(count + 2), rng.randint(0, min(3, count))))
            questions.append(Question(str(item), number, parents, rng.choice(SKILLS), atoms=atoms))
        given[str(item)] = [[values(rng) for _ in range(count)] for _ in range(rng.randint(1, 4))]
        for tile, row in enumerate(given[str(item)]):
            answers |= {(str(item), number, tile): value for number, value in enumerate(row, start=1)}
    return questions, given, answers


def share(rng):
    return rng.choice((0.0, 1.0, 1e-9, rng.random(), rng.random()))


@pytest.mark.parametrize("seed", range(60))
def test_geneval2_is_two_means_of_means(seed):
    questions, given, answers = random_case(seed, share)
    score = score_geneval2(questions, answers)
    with np.errstate(divide="ignore"):
        geometric = {item: np.mean([gmean(row) for row in rows]) for item, rows in given.items()}
    assert score.figures["soft_tifa_am"] == pytest.approx(100 * np.mean([np.mean(rows) for rows in given.values()]))
    assert score.figures["soft_tifa_gm"] == pytest.approx(100 * np.mean(list(geometric.values())))
    asked = {item: [q for q in questions if q.item_id == item] for item in given}
    for skill in SKILLS:
        found = [
            row[i]
            for item, rows in given.items()
            for row in rows
            for i, q in enumerate(asked[item])
            if q.category == skill
        ]
        assert score.groups["skill_am"].get(skill) == (pytest.approx(100 * np.mean(found)) if found else None)
    for atoms in range(3, 11):
        found = [geometric[item] for item in given if asked[item][0].atoms == atoms]
        assert score.groups["atoms_gm"].get(str(atoms)) == (pytest.approx(100 * np.mean(found)) if found else None)


@pytest.mark.parametrize("seed", range(60))
def test_compbench_is_the_mean_of_products(seed):
    questions, given, answers = random_case(seed, share)
    products = [float(f"{np.prod(row):.4f}") for rows in given.values() for row in rows]
    assert score_compbench(questions, answers).figures["blip_vqa"] == pytest.approx(np.mean(products), abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_oneig_looks_at_the_parents_own_answers(seed):
    questions, given, answers = random_case(seed, lambda rng: float(rng.random() < 0.7))
    items = []
    for item, rows in given.items():
        group = [question for question in questions if question.item_id == item]
        images = []
        for row in rows:
            kept = list(row)
            for index, question in enumerate(group):
                for parent in question.parents:
                    if 1 <= parent <= len(row) and row[parent - 1] == 0:
                        kept[index] = 0
            images.append(sum(kept) / len(kept))
        items.append(sum(images) / len(images))
    assert score_oneig(questions, answers).figures["alignment"] == pytest.approx(np.mean(items))


def test_a_no_does_not_cascade_in_oneig():
    chain = [Question("a", 1), Question("a", 2, (1,)), Question("a", 3, (2,))]
    answers = {("a", 1, 0): 0.0, ("a", 2, 0): 1.0, ("a", 3, 0): 1.0}
    assert score_oneig(chain, answers).figures["alignment"] == pytest.approx(1 / 3)  # DPG-Bench: 0


def test_items_without_answers_are_named_and_gaps_refused():
    questions = [Question("a", 1), Question("a", 2), Question("b", 1)]
    for rule in (score_geneval2, score_compbench, score_oneig):
        assert rule(questions, {("a", 1, 0): 1.0, ("a", 2, 0): 1.0}).unanswered == ("b",)
        with pytest.raises(UsageError, match="item a, proposition 2: no answer for tile 0"):
            rule(questions, {("a", 1, 0): 1.0})


# Files -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "geneval2_data.jsonl"
    path.write_text(metric_models.GENEVAL2)
    return path


def test_the_scripts_lists_and_a_table_of_answers_are_the_same(tmp_path, prompts, capsys):
    (tmp_path / "score_lists.json").write_text("[[0.25, 1.0], [0.5]]")
    (tmp_path / "bare.csv").write_text("item_id,proposition_id,answer\n0,1,0.25\n0,2,1\n1,1,0.5\n")
    (tmp_path / "full.csv").write_text(
        "item_id,proposition_id,skill,atom_count,probability\n0,1,count,3,.25\n0,2,object,3,1.0\n1,1,count,4,0.5\n"
    )
    found = []
    for name, questions in (("score_lists.json", prompts), ("bare.csv", prompts), ("full.csv", None)):
        words = ["answers", "--benchmark", "geneval2", "--answers", str(tmp_path / name), "--json"]
        assert main([*words, *(["--questions", str(questions)] if questions else [])]) == 0
        found.append(json.loads(capsys.readouterr().out)["results"])
    assert found[0] == found[1] == found[2]
    assert found[0]["figures"] == pytest.approx({"soft_tifa_am": 56.25, "soft_tifa_gm": 50.0})
    assert found[0]["groups"] == {"skill_am": {"count": 37.5, "object": 100.0}, "atoms_gm": {"3": 50.0, "4": 50.0}}


def test_yes_and_no_of_oneig_and_probabilities_of_compbench(tmp_path, capsys):
    (tmp_path / "a.csv").write_text(
        "item_id,proposition_id,dependency,tuple,tile,answer\na,1,0,color,0,No\na,2,1,color,0,Yes\n"
    )
    assert main(["answers", "--benchmark", "oneig", "--answers", str(tmp_path / "a.csv")]) == 0
    assert capsys.readouterr().out.split()[:2] == ["alignment", "0.0000"]
    (tmp_path / "b.csv").write_text(
        "item_id,proposition_id,category,answer\na,1,color,0.5\na,2,color,0.25\nb,1,shape,1\n"
    )
    assert main(["answers", "--benchmark", "compbench", "--answers", str(tmp_path / "b.csv")]) == 0
    words = capsys.readouterr().out.split()
    assert words[:2] == ["blip_vqa", "0.5625"] and words[words.index("color") + 1] == "0.1250"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "item_id,proposition_id,answer\n0,1,yes\n", "line 2: 'yes' is not a probability from 0 to 1"),
        ("a.csv", "item_id,proposition_id,answer\n0,1,1.5\n", "line 2: '1.5' is not a probability"),
        ("a.csv", "item_id,proposition_id,answer\n2,1,1\n", "item 2, proposition 1 is not in .*counted from 0"),
        ("a.json", "[[1, 1]]", "holds 1 lists for 2 prompts"),
        ("a.json", "{}", "holds no list for 2 prompts"),
        ("a.json", "[[1], [1]]", "list 0 does not hold 2 probabilities"),
        ("a.json", '[[1, "x"], [1]]', "list 0 holds 'x', which is not a probability"),
        ("a.json", "[[1, NaN], [1]]", "NaN"),
    ],
)
def test_answers_that_do_not_fit_are_refused_in_one_line(tmp_path, prompts, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        read_geneval2_answers(tmp_path / name, prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"prompt": "a"}',
        '{"prompt": "a", "vqa_list": [["q"]]}',
        '{"prompt": "a", "vqa_list": [["q", "Yes"]], "skills": ["object", "count"]}',
        '{"prompt": "a", "vqa_list": []}',
        '{"prompt": "a", "vqa_list": 3}',
        '{"prompt": "a", "vqa_list": [["q", "Yes"]], "atom_count": "many"}',
    ],
)
def test_prompts_that_are_none_are_refused_with_their_line(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(metric_models.GENEVAL2 + line + "\n")
    (tmp_path / "a.csv").write_text("item_id,proposition_id,answer\n0,1,1\n")
    with pytest.raises(UsageError, match=r"p\.jsonl line 3: "):
        read_geneval2_answers(tmp_path / "a.csv", tmp_path / "p.jsonl")


def test_lists_alone_need_their_prompts(tmp_path):
    (tmp_path / "a.json").write_text("[[1.0]]")
    with pytest.raises(UsageError, match="give --questions"):
        read_geneval2_answers(tmp_path / "a.json", None)


# The metric ------------------------------------------------------------------------------------------------------------


def test_a_count_may_be_a_word_or_digits_and_all_else_is_yes():
    assert spellings_of("How many cows are in the image?", "three") == ("three", "Three", " three", " Three", "3", " 3")
    assert spellings_of("Are the cows plastic?", "Yes") == ("Yes", "yes", " yes", " Yes")
    assert spellings_of("How many?", "eleven")[4:] == ("other", " other")  # as published: it counts to ten


def test_images_are_asked_their_prompts_questions_and_several_of_one_prompt_are_averaged(prompts):
    asked = []

    class Says:
        def __call__(self, image, question, spellings):
            asked.append((question, spellings[0]))
            return np.asarray(image)[0, 0, 0] / 255

        def describe(self):
            return {"kind": "says"}

    metric = create("geneval2", questions=str(prompts), judge=Says())
    images = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    images[0], images[2] = 255, 51
    rows = metric.rows(images, ["a photo of a dog", {"prompt": "a photo of a dog"}, "two cats"])
    assert asked[:2] == [
        ("How many dogs are in the image? Answer in one word.", "one"),
        ("Are there any dogs in the image? Answer in one word.", "Yes"),
    ]
    assert [row["value"] for row in rows] == pytest.approx([1.0, 0.0, 0.2])
    summary = metric.summary(rows, [""] * 3)
    assert summary["soft_tifa_gm"] == pytest.approx(35.0) and summary["prompts"] == 2
    assert summary["skill_am"] == pytest.approx({"count": 40.0, "object": 50.0})
    with pytest.raises(UsageError, match="no questions for prompt 'a cow'"):
        metric.score(images[:1], ["a cow"])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return metric_models.qwen3_vl_folder(tmp_path_factory.mktemp("qwen"))


def test_the_judge_gives_the_probability_of_the_first_token(qwen):
    judge = TransformersJudge(qwen)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Is it?"}]
    inputs = judge.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        share_V = judge.model(**inputs).logits[0, -1].float().softmax(0)
    tokenizer = judge.processor.tokenizer
    yes, y, space = (tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "y", "Ġ"))
    spellings = ("Yes", "yes", " yes", " Yes")
    assert judge.first_tokens(spellings) == [yes, y, space]  # the space begins two of them
    assert judge(picture, "Is it?", spellings) == pytest.approx(float(share_V[[yes, y, space]].sum()), rel=1e-3)
    assert judge.describe() == {"model": qwen, "precision": "bfloat16"}


def test_geneval2_loads_a_named_model(qwen, prompts):
    metric = create("geneval2", questions=str(prompts), model=qwen)
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    values = metric.score(images, ["a photo of a dog", "two cats"])
    assert ((values > 0) & (values < 1)).all()


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no chat template"):
        TransformersJudge(metric_models.blip_folder(tmp_path))
