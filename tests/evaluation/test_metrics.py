from openimp.common.progress import console
from openimp.evaluation.results import table

COMMON = {"n": 1350, "interval": [0.052, 0.0711], "skipped": 0}
RETRIEVAL = COMMON | {"set": "unseen vendor", "task": "image -> text", "r1": 0.0613, "r5": 0.2144, "r10": 0.3,
                      "median_rank": 31.5, "mrr": 0.1234, "chance": 0.0007}  # fmt: skip
ZERO_SHOT = COMMON | {"set": "groups", "task": "image -> group", "top1": 0.5, "top5": 1.0, "chance": 0.1}


def printed(*results) -> tuple[list[str], list[str]]:
    """The lines of the table in a terminal of 80 columns, and those below the head with single spaces."""
    with console.capture() as captured:
        console.print(table([*results]), width=80)
    lines = captured.get().splitlines()
    head = next(i for i, line in enumerate(lines) if set(line) == {"─"})
    return lines, [" ".join(line.split()) for line in lines[head + 1 :]]


def test_the_table_shows_every_figure_beside_chance():
    lines, cells = printed(RETRIEVAL, RETRIEVAL | {"task": "text -> image"}, ZERO_SHOT)
    assert cells[:5] == [
        "unseen vendor",
        "image -> text 1350 6.1 [5.2, 7.1] 21.4 30.0 31.5 0.123 0.07",
        "text -> image 1350 6.1 [5.2, 7.1] 21.4 30.0 31.5 0.123 0.07",
        "groups",
        "image -> group 1350 50.0 [5.2, 7.1] 100.0 10.0",
    ]
    ends = {len(line.rstrip()) for line in lines if "->" in line}
    assert len(ends) == 1, "chance stands below chance"
    assert "unreadable" not in " ".join(lines)
    assert "unreliable" not in " ".join(lines)


def test_the_table_warns_of_few_queries_and_of_unreadable_rows():
    rows = {"n": 50, "skipped": 3, "unknown": 1}
    _, cells = printed(RETRIEVAL | rows, ZERO_SHOT | {"n": 49}, ZERO_SHOT | {"n": 6})
    assert "n is below 50, so results and intervals are unreliable: groups" in " ".join(cells)
    assert "unreadable rows left out: unseen vendor 3" in " ".join(cells)
    assert "texts without a word that the model knows: unseen vendor 1" in " ".join(cells)


def test_the_table_fits_80_columns_with_any_name_and_prints_brackets_as_they_are():
    _, cells = printed(ZERO_SHOT | {"task": "image -> [/b] class [fine]", "set": "a [red] set", "skipped": 1})
    assert "image -> [/b] class [fine]" in " ".join(cells)
    assert "left out: a [red] set 1" in " ".join(cells)
    wide = {"set": "a set with a name that is long " * 3, "n": 1_234_567, "median_rank": 123_456.5}
    lines, cells = printed(RETRIEVAL | wide)
    assert max(map(len, lines)) <= 80
    assert "1234567 6.1 [5.2, 7.1] 21.4 30.0 123456 0.123 0.07" in " ".join(cells)
