"""The user's defaults: what decides, and where each is used."""

from pathlib import Path

import pytest

from rsb_cluster import backends
from rsb_cluster.config import catalog
from rsb_cluster.config.environment import VARIABLES
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.config.settings import BUILT_IN, Setting, Settings, data_root, settings
from rsb_cluster.config.sweep_file import Grid, SweepFile
from rsb_cluster.errors import ConfigError
from rsb_cluster.runs.lookup import runs_folder
from rsb_cluster.submission.plan import plan
from rsb_cluster.submission.request import Request
from rsb_cluster.submission.site import Site
from tests.unit.bundled import load_job

ROOT = Path(__file__).parents[3]


@pytest.fixture
def user_file(here, monkeypatch) -> Path:
    """The user's own file of settings, whose folder exists."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "etc"))
    folder = here / "etc" / "rsb-cluster"
    folder.mkdir(parents=True)
    return folder / "config.toml"


def test_the_environment_comes_before_this_folder_and_this_before_the_users_own(here, user_file, monkeypatch):
    assert set(settings().values()) == {Setting("", BUILT_IN)}
    user_file.write_text('runs = "/user"\ndata = "/user"\naccount = "mine"\n')
    (here / "rsb-cluster.toml").write_text('runs = "/here"\ndata = "/here"\npartition = ""\n')
    monkeypatch.setenv("RSB_RUNS", "/variable")
    found = settings()
    assert found["runs"] == Setting("/variable", "RSB_RUNS")
    assert found["data"] == Setting("/here", f"{here}/rsb-cluster.toml")
    assert found["account"] == Setting("mine", str(user_file))
    assert found["partition"] == Setting("", BUILT_IN)
    assert (runs_folder(), runs_folder("", "/chosen"), data_root()) == ("/variable", "/chosen", "/here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('acount = "x"', "rsb-cluster.toml: unknown key 'acount'. Did you mean 'account'?"),
        ('share = "all"', "rsb-cluster.toml: share = 'all': must be '', 'private' or 'group'."),
        ("account = ", "rsb-cluster.toml is not valid TOML"),
        ("account = vision", 'line 1, column 11). Text stands in straight quotes: key = "text".'),
        (
            'runs = "$SHARED/runs"',
            "runs = '$SHARED/runs': variables are not replaced here. Write it out: '/shared/runs'",
        ),
        (
            'data = "/scratch/${NOBODY}/x"',
            "data = '/scratch/${NOBODY}/x': variables are not replaced here. Write it out.",
        ),
        ('job = "~nobody-here/x.toml"', "cannot use ~nobody-here/x.toml: this system knows no home folder for ~nobody"),
    ],
)
def test_a_mistake_is_named_with_its_file(here, text, message, monkeypatch):
    monkeypatch.setenv("SHARED", "/shared")
    (here / "rsb-cluster.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings()
    assert message in str(caught.value)


@pytest.mark.parametrize("job", ["nowhere", "here.toml"])
def test_a_job_that_is_not_there_is_named_with_the_setting_that_names_it(here, job):
    (here / "rsb-cluster.toml").write_text(f'job = "{job}"')
    with pytest.raises(ConfigError, match=rf"there is no .*{job}.* {here}/rsb-cluster.toml names it\."):
        catalog.load_job(job)


def test_a_wrong_variable_is_named(here, monkeypatch):
    monkeypatch.setenv("RSB_SHARE", "all")
    with pytest.raises(ConfigError, match="the environment: share = 'all'"):
        settings()


def test_account_and_partition_are_for_jobs_that_take_such_and_name_none(here, monkeypatch):
    monkeypatch.setenv("RSB_ACCOUNT", "vision")
    monkeypatch.setenv("RSB_PARTITION", "gpu")
    assert backends.at_site(load_job("slurm")).slurm == {"account": "vision", "partition": "gpu"}
    assert backends.at_site(load_job("slurm", "slurm.partition=cpu")).slurm == {"account": "vision", "partition": "cpu"}
    assert backends.at_site(load_job("local")).slurm == {}


def test_a_submit_uses_the_settings_unless_options_say_more(here, digits, monkeypatch):
    def planned(recipe: str, *changes: str, **options):
        file = SweepFile(name="x", grid=(Grid(recipes=(recipe,)),))
        asked = Request(data=str(digits), overrides=tuple(parse_overrides(changes)), **options)
        return plan(file, None, asked, is_sweep=False, dry_run=True).runs[0].point.job

    (here / "rsb-cluster.toml").write_text('job = "slurm-cpu"\naccount = "vision"\nshare = "group"\n')
    given = ("data.make=''",)  # so that it is no recipe that trains here wherever it is typed
    job = planned("digits", *given)
    assert (job.name, job.slurm["account"], job.share) == ("slurm-cpu", "vision", "group")
    job = planned("digits", *given, site=Site(account="other"), share="private")
    assert (job.slurm["account"], job.share) == ("other", "private")
    assert planned("digits", *given, job="local").name == "local"
    assert planned("digits").name == "local"


def test_a_job_file_comes_before_the_settings_of_jobs(here, monkeypatch):
    monkeypatch.setenv("RSB_SHARE", "group")
    (here / "mine.toml").write_text('name = "mine"\nbackend = "local"\nshare = "private"\n')
    assert catalog.load_job("./mine.toml")[0].share == "private"
    assert load_job("local").share == "group"


def test_config_show_says_what_decides(rsb):
    (rsb.cwd / "rsb-cluster.toml").write_text('account = "vision"\n')
    rsb.env["RSB_RUNS"] = "/elsewhere"
    rows = {line.split()[0]: line.split()[1:4] for line in rsb("config", "show").splitlines()}
    assert rows.keys() - {"setting"} == Settings.model_fields.keys()
    assert rows["runs"][:2] == ["/elsewhere", "RSB_RUNS"]
    assert rows["account"][:2] == ["vision", f"{rsb.cwd}/rsb-cluster.toml"]
    assert rows["data"] == [f"{rsb.cwd}/data", "built", "in"]
    assert rsb.json("config", "show", "--json")["runs"] == {"value": "/elsewhere", "source": "RSB_RUNS"}


def test_config_show_names_a_variable_that_was_probably_meant_otherwise(rsb):
    rsb.env |= {"RSB_ACOUNT": "vision", "RSB_ADDRESS": "10.0.0.7"}
    said = rsb.run("config", "show").stderr
    assert "note: RSB_ACOUNT is set, and means nothing here. Did you mean RSB_ACCOUNT?\n" in said
    assert "RSB_ADDRESS" not in said


def test_the_table_of_variables_and_the_help_have_all_of_them(rsb):
    table = (ROOT / "docs" / "settings.md").read_text()
    rows = dict(line.strip("| \n").split(" | ") for line in table.splitlines() if line.startswith("| `"))
    assert rows == {f"`{name}`": meaning for name, meaning in VARIABLES.items()}
    assert {f"RSB_{name.upper()}" for name in Settings.model_fields} <= VARIABLES.keys()
    shown = rsb("--help")
    assert all(f"  {name:<18}{meaning}\n" in shown for name, meaning in VARIABLES.items())


def test_a_folder_that_nobody_may_look_into_says_nothing(here, monkeypatch):
    (here / "file").write_text("")
    for folder in (here / "file" / "below", "~nobody-of-this-name"):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
        assert settings()["runs"] == Setting("", BUILT_IN)
