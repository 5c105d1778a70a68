from openimp.report.markup import Markup, join, table, tag


def test_text_and_attributes_are_escaped_and_markup_is_not():
    hostile = '<script>alert("1")</script>&'
    escaped = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;"
    assert tag("p", hostile, title=hostile) == f'<p title="{escaped}">{escaped}</p>'
    assert tag("p", tag("b", "x"), ["<", 3, None, [Markup("<br>")]]) == "<p><b>x</b>&lt;3<br></p>"
    assert hostile not in table(hostile, [hostile], [[hostile, hostile]])
    assert isinstance(join("a", tag("b")), Markup)


def test_attributes_are_named_as_html_has_them_and_left_out_where_there_is_none():
    assert (
        tag("img", alt="", class_="a", aria_label="b", id=None, hidden=False) == '<img alt="" class="a" aria-label="b">'
    )


def test_a_row_begins_with_its_header():
    shown = table("what", ["name", "count"], [["a", 1]])
    assert '<tr><th scope="row">a</th><td class="number">1</td></tr>' in shown
    assert '<th scope="col">name</th><th scope="col" class="number">count</th>' in shown
