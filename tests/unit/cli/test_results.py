"""Tables and reports do not overwrite other files."""


def test_a_report_does_not_overwrite_another_programs_file(rsb):
    """Other tools write a report.html, too; one that the user names is replaced, as in every tool, but no folder."""
    theirs = rsb.cwd / "report.html"
    theirs.write_text("<html>tests passed</html>")
    assert "report.html was not made by this command. Name another file with -o." in rsb.error("report")
    assert theirs.read_text() == "<html>tests passed</html>"
    rsb("report", "-o", "report.html")
    rsb("report")
    assert "rsb-cluster report" in theirs.read_text()
    for command in ("report", "collect"):
        assert f"cannot write {rsb.cwd}: Is a directory" in rsb.error(command, "-o", str(rsb.cwd))


def test_a_missing_folder_is_named_and_not_made(rsb):
    for command in ("report", "collect"):
        assert "there is no folder nowhere. Make it" in rsb.error(command, "-o", "nowhere/out.html")
    assert not (rsb.cwd / "nowhere").exists()


def test_json_is_a_format(rsb):
    assert rsb.json("collect", "--json") == rsb.json("collect", "--format", "json") == {
        "groups": [], "unfinished": [], "evaluations": [],
    }  # fmt: skip
    assert rsb("collect", "--format", "csv").startswith("state,counted,run_id,")
    assert "contradict each other" in rsb.error("collect", "--json", "--format", "csv")
    assert "--publish writes collect.json and report.html" in rsb.error("collect", "x", "--publish", "-o", "x.csv")


def test_what_cannot_be_read_is_left_out_with_a_word_and_keeps_nothing_else_from_the_table(rsb):
    for name in ("sweeps/x-0123abcd.json", "evaluations/w/y.json"):
        file = rsb.cwd / "runs" / name
        file.parent.mkdir(parents=True)
        file.write_text("{")
    for format in ("csv", "json", "table"):
        done = rsb.run("collect", "--format", format)
        assert done.returncode == 0 and "a sweep is left out: " in done.stderr
        assert "evaluations/w/y.json cannot be read" in done.stdout + done.stderr
