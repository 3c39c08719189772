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
