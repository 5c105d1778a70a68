"""What is said of examples that cannot be read."""

from openimp.training.bad_examples import BadExamples


def test_the_first_bad_example_and_each_lost_rest_of_a_shard_are_told_at_once(tmp_path, capsys):
    bad = BadExamples(tmp_path, step=0, limit=1.0, state={})
    for step, name in enumerate(["0.tar[a]", "0.tar[b]", "1.tar[the rest]", "2.tar[the rest]"]):
        bad.add(step, "named", read=8, bad=[(name, "broken")])
        bad.gather()
    told = [line.split()[3] for line in capsys.readouterr().out.replace(" rest", "_rest").splitlines()]
    assert told == ["0.tar[a]:", "1.tar[the_rest]:", "2.tar[the_rest]:"]
    assert bad.state == {"named": {"read": 32, "bad": 4}}
