"""DPG-Bench's arithmetic on hand-made answers; expected figures are worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagevar.errors import UsageError
from tuner.metrics.answers_file import Question, is_yes, read_answers
from tuner.metrics.dpg import score_dpg

Y, N = 1.0, 0.0


def ask(item, proposition, *parents, category="entity - whole"):
    return Question(item, proposition, parents, category)


FIRST = ask("zero", 1)  # the line that the published script loses


def answers(item, *tiles):
    """tiles: one tuple of answers per tile, propositions 1, 2, ..."""
    return {
        (item, proposition, tile): value
        for tile, values in enumerate(tiles)
        for proposition, value in enumerate(values, start=1)
    }


def score(questions, given, mode):
    result = score_dpg([FIRST, *questions], given | answers("zero", (Y,)), mode)
    return {prompt.item_id: prompt for prompt in result.prompts}, result


MODES = pytest.mark.parametrize("mode", ["published", "corrected"])


@MODES
def test_a_tile_is_the_mean_of_its_questions_and_a_prompt_of_its_tiles(mode):
    prompts, result = score([ask("a", 1), ask("a", 2)], answers("a", (Y, N), (Y, Y), (N, N), (Y, Y)), mode)
    assert prompts["a"].tiles == (0.5, 1.0, 0.0, 1.0)
    assert prompts["a"].score == 0.625
    assert result.score == (62.5 if mode == "published" else (62.5 + 100) / 2)


@MODES
def test_a_no_cascades_to_children_and_their_children(mode):
    chain = [ask("a", 1), ask("a", 2, 1), ask("a", 3, 2), ask("a", 4)]
    prompts, _ = score(chain, answers("a", (N, Y, Y, Y)), mode)
    assert prompts["a"].score == 0.25


@MODES
def test_the_walk_goes_in_file_order(mode):
    # 2 depends on 3, which is listed later: when 2 is judged, 3 is still yes, and its own fall comes too late.
    prompts, _ = score([ask("a", 1), ask("a", 2, 3), ask("a", 3, 1)], answers("a", (N, Y, Y)), mode)
    assert prompts["a"].score == pytest.approx(1 / 3)


@MODES
def test_one_no_among_several_parents_is_enough_and_zero_is_no_parent(mode):
    given = answers("a", (Y, N, Y, Y))
    prompts, _ = score([ask("a", 1, 0), ask("a", 2, 0), ask("a", 3, 1, 2), ask("a", 4, 0, 1)], given, mode)
    assert prompts["a"].score == 0.5


@MODES
def test_tiles_do_not_leak_into_each_other(mode):
    prompts, _ = score([ask("a", 1), ask("a", 2, 1)], answers("a", (N, Y), (Y, Y)), mode)
    assert prompts["a"].tiles == (0.0, 1.0)


def test_only_the_exact_word_counts():
    assert [is_yes(answer) for answer in ("yes", "Yes", "yes.", " yes", "no", "")] == [1, 0, 0, 0, 0, 0]


def test_published_loses_the_first_question_and_the_prompt_that_needs_it():
    questions = [ask("a", 1), ask("a", 2, 1), ask("b", 1)]
    given = answers("a", (Y, Y)) | answers("b", (Y,))
    published = score_dpg(questions, given, "published")
    assert [prompt.item_id for prompt in published.prompts] == ["b"]
    assert "proposition 1" in published.dropped["a"]
    assert score_dpg(questions, given, "corrected").dropped == {}


def test_published_scores_on_without_the_first_question_if_nothing_needs_it():
    questions = [ask("a", 1), ask("a", 2), ask("a", 3)]
    given = answers("a", (N, Y, Y))
    assert score_dpg(questions, given, "published").score == 100.0
    assert score_dpg(questions, given, "corrected").score == pytest.approx(200 / 3)


def test_published_drops_an_item_that_has_only_the_first_question():
    result = score_dpg([ask("a", 1)], answers("a", (Y,)), "published")
    assert result.score is None and list(result.dropped) == ["a"]


def test_published_meets_a_missing_parent_only_if_no_earlier_parent_said_no():
    orphan = [ask("a", 1), ask("a", 2, 1, 9)]
    assert score(orphan, answers("a", (N, Y)), "published")[0]["a"].score == 0.0
    assert "a" in score(orphan, answers("a", (Y, Y)), "published")[1].dropped
    with pytest.raises(UsageError, match="depends on 9"):
        score(orphan, answers("a", (N, Y)), "corrected")


def test_published_keeps_the_last_run_of_an_item_that_comes_twice():
    questions = [ask("a", 1), ask("b", 1), ask("a", 2)]
    given = answers("a", (N, Y)) | answers("b", (Y,))
    assert score(questions, given, "published")[0]["a"].score == 1.0
    assert score(questions, given, "corrected")[0]["a"].score == 0.5


def test_categories_published_from_the_last_tile_before_dependencies_corrected_from_all_after():
    questions = [ask("a", 1), ask("a", 2, 1, category="attribute - color"), ask("a", 3, category="attribute - size")]
    given = answers("a", (Y, Y, Y), (N, Y, N))
    _, published = score(questions, given, "published")
    assert published.l2 == {"attribute - color": 100.0, "attribute - size": 0.0, "entity - whole": 0.0}
    assert published.l1 == {"attribute": 50.0, "entity": 0.0}
    _, corrected = score(questions, given, "corrected")
    assert corrected.l2["attribute - color"] == 50.0 and corrected.l2["attribute - size"] == 50.0
    assert corrected.l2["entity - whole"] == pytest.approx(200 / 3)  # (yes, no) and the first question's yes


def test_an_unanswered_question_is_refused_and_an_unanswered_item_reported():
    with pytest.raises(UsageError, match="item a, proposition 2: no answer for tile 0"):
        score_dpg([FIRST, ask("a", 1), ask("a", 2)], answers("a", (Y,)), "corrected")
    assert score_dpg([FIRST, ask("a", 1)], answers("zero", (Y,)), "corrected").unanswered == ("a",)


# The file ----------------------------------------------------------------------------------------------------------

LONG = """item_id,proposition_id,dependency,tuple,tile,answer
a,1,0,entity - whole (cat),0,yes
a,2,"1, 0","attribute - color (cat, black)",0,no
a,1,0,entity - whole (cat),1,no
a,2,"1, 0","attribute - color (cat, black)",1,yes
"""
EXPECTED = {("a", 1, 0): Y, ("a", 2, 0): N, ("a", 1, 1): N, ("a", 2, 1): Y}
SAME = {
    "long": LONG,
    "tab": LONG.replace('"1, 0"', "1;0")
    .replace('"attribute - color (cat, black)"', "attribute - color (x)")
    .replace(",", "\t"),
    "bom and crlf": "\ufeff" + LONG.replace("\n", "\r\n"),
    "no tile column": """item_id,proposition_id,dependency,tuple,answer
a,1,0,entity - whole (cat),yes
a,1,0,entity - whole (cat),no
a,2,1,attribute - color (cat),no
a,2,1,attribute - color (cat),yes
""",
    "wide": """item_id,proposition_id,dependency,category_broad,category_detailed,answer_0,answer_1
a,1,,entity,whole,yes,no
a,2,1,attribute,color,no,yes
""",
    "tile names": LONG.replace(",0,yes", ",TL,yes")
    .replace(",0,no", ",TL,no")
    .replace(",1,no", ",TR,no")
    .replace(",1,yes", ",tr,yes"),
    "scores": """Item_ID, qid, parents, category, sample, score
a, 1, 0, entity - whole (cat), 0, 1
a, 2, 1, attribute - color (cat), 0, 0
a, 1, 0, entity - whole (cat), 1, 0
a, 2, 1, attribute - color (cat), 1, 1
""",
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME.keys())
def test_every_accepted_layout_reads_alike(tmp_path, text):
    path = tmp_path / "answers.csv"
    path.write_bytes(text.encode())
    questions, given = read_answers(path)
    assert given == EXPECTED
    assert [(question.proposition_id, set(question.parents) - {0}) for question in questions] == [(1, set()), (2, {1})]
    assert [question.category for question in questions] == ["entity - whole", "attribute - color"]
    assert score_dpg(questions, given, "corrected").score == 25.0


def test_answers_beside_the_official_question_file(tmp_path):
    (tmp_path / "q.csv").write_text(
        "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
        "question_natural_language\n"
        "a,t,k,1,0,entity,whole,entity - whole (cat),Is there a cat?\nb,t,k,1,0,entity,whole,entity - whole (x),Q?\n"
    )
    (tmp_path / "a.csv").write_text("item_id,proposition_id,tile,answer\nb,1,0,yes\n")
    questions, given = read_answers(tmp_path / "a.csv", tmp_path / "q.csv")
    assert [question.text for question in questions] == ["Is there a cat?", "Q?"]
    assert score_dpg(questions, given, "published").score == 100.0
    (tmp_path / "a.csv").write_text("item_id,proposition_id,tile,answer\nc,1,0,yes\n")
    with pytest.raises(UsageError, match="item c, proposition 1 is not in"):
        read_answers(tmp_path / "a.csv", tmp_path / "q.csv")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no rows"),
        ("item_id,proposition_id,answer\n", "no rows"),
        ("proposition_id,answer\n1,yes\n", "no column item_id"),
        ("item_id,proposition_id\na,1\n", "no answer column"),
        ("item_id,proposition_id,answer\na,one,yes\n", "line 2: proposition_id 'one'"),
        ("item_id,proposition_id,dependency,answer\na,1,1,2,yes\n", "line 2: 5 cells"),
        ("item_id,proposition_id,answer\na,1,\n", "answer is empty"),
        ("item_id,proposition_id,tile,answer\na,1,0,yes\na,1,0,no\n", "line 3: a second"),
        (
            "item_id,proposition_id,dependency,tile,answer\na,1,0,0,yes\na,1,2,1,no\n",
            "line 3: .* a different dependency",
        ),
    ],
)
def test_unreadable_files_are_refused_with_their_line(tmp_path, text, named):
    path = tmp_path / "answers.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=named):
        read_answers(path)


def read(tmp_path, *cells, column="answer"):
    path = tmp_path / "answers.csv"
    path.write_text(f"item_id,proposition_id,tile,{column}\n" + "".join(f"a,{i},0,{c}\n" for i, c in enumerate(cells)))
    return list(read_answers(path)[1].values())


@pytest.mark.parametrize("column", ["answer", "score"])
@pytest.mark.parametrize(
    ("cells", "named"),
    [
        (("0.9", "0.2"), "line 2: '0.9' is neither an answer nor 0 or 1"),
        (("1", "0.5"), "line 3: '0.5'"),
        (("0", "2"), "line 3: '2'"),
        (("97%", "3%"), "line 2: '97%'"),
        (("yes", "0.7"), "line 3: '0.7'"),
        (("yes", "1"), "line 3: '1' among answers in words"),
        (("no", "nan"), "line 3: 'nan'"),
        (("yes", "  "), "line 3: the answer is empty"),
    ],
)
def test_numbers_where_yes_or_no_belongs_are_refused(tmp_path, column, cells, named):
    with pytest.raises(UsageError, match=named):
        read(tmp_path, *cells, column=column)


@pytest.mark.parametrize("cells", [("1", "0"), ("1.0", "0.00"), ("TRUE", "False"), ("true", " 0"), ("1", "false")])
def test_columns_of_zero_and_one_are_scores(tmp_path, cells):
    assert read(tmp_path, *cells) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (("Yes", "Yes."), "2 of 2 answers begin with yes but are not exactly 'yes'.* 'Yes' on line 2"),
        (("yes ", "yes"), "1 of 2 answers .* 'yes ' on line 2"),
        (("no", '"yes, it is"'), "1 of 2 answers .* on line 3"),
        (("maybe", "unclear"), "no answer is yes or no, so they all count as no; the first: 'maybe'"),
    ],
)
def test_words_that_count_as_no_against_their_looks_are_said(tmp_path, cells, said):
    with pytest.warns(UserWarning, match=said):
        assert read(tmp_path, *cells) == [float(cell == "yes") for cell in cells]


def test_items_without_all_their_tiles_are_said(tmp_path):
    (tmp_path / "a.csv").write_text("item_id,proposition_id,tile,answer\na,1,0,yes\na,1,1,no\nb,1,0,yes\n")
    with pytest.warns(UserWarning, match="1 of 2 items have answers on fewer than 2 tiles; the first: b"):
        read_answers(tmp_path / "a.csv")


cells = st.one_of(
    st.sampled_from(["a", "b", "1", "2", "0", "1,2", "yes", "no", "", "TL", "1e400", "nan", '"', "\x00"]),
    st.text(max_size=4),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["item_id", "proposition_id", "dependency", "tile", "answer", "answer_0", "tuple", "x"]),
        unique=True,
        min_size=1,
    ),
    st.lists(st.lists(cells, min_size=1, max_size=6), max_size=5),
)
def test_whatever_the_file_holds_the_answer_is_a_score_or_a_usage_error(tmp_path, header, rows):
    path = tmp_path / "answers.csv"
    path.write_text("\n".join(",".join(row) for row in [header, *rows]), encoding="utf-8", errors="replace")
    try:
        questions, given_answers = read_answers(path)
        scores = [score_dpg(questions, given_answers, mode) for mode in ("published", "corrected")]
    except UsageError as error:
        assert str(error)
    else:
        assert all(result.score is None or 0 <= result.score <= 100 for result in scores)
