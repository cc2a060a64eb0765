from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from markdown_it import MarkdownIt

from airflow_mlops.core.model.model_card import Change, describe_evaluation, describe_model, describe_request
from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
from airflow_mlops.core.page import markdown
from airflow_mlops.serving.package import read_package
from tests.packages import build_package

if TYPE_CHECKING:
    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.core.page import Page

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>|[a](javascript:alert(3))`x`\n\n# heading\u202e"
)

INTERVAL = {"value": 2.5, "low": 2.4, "high": 2.6}
GUESS = {"value": {"value": 9.0, "low": 8.8, "high": 9.2}, "uplift": 0.7, "p_value": 1e-9}
#: As the evaluation writes it, one metric.
ONE_METRIC: dict[str, Any] = {
    "verdict": "promote",
    "reason": "MAE 2.5 against 3.1",
    "champion_version": "4",
    "report": {
        "row_count": 600,
        "confidence": 0.95,
        "deciding": {
            "metric": "mae",
            "challenger": INTERVAL,
            "champion": {
                "value": {"value": 3.1, "low": 3.0, "high": 3.2},
                "uplift": 0.19,
                "difference": {"value": 0.6, "low": 0.5, "high": 0.7},
                "p_value": 0.001,
                "minimum_detectable_difference": 0.2,
            },
            "baselines": {"a simple guess": GUESS},
        },
    },
}
#: With everything it may write.
EVERYTHING: dict[str, Any] = {
    "verdict": "reject",
    "reason": "a slice got worse",
    "champion_version": "4",
    "report": ONE_METRIC["report"]
    | {
        "others": [{"metric": "rmse", "challenger": INTERVAL, "champion": None, "baselines": {}}],
        "not_measured": {"log_loss": "it gives no probabilities"},
    },
    "checks": [
        {"name": "slices", "outcome": "fail", "reason": "kind b is worse"},
        {"name": "artifact", "outcome": "not_measured", "reason": "no service to ask"},
    ],
    "slices": {
        "loss": "mae",
        "looked_at": 12,
        "worst": [
            {"where": {"kind": "b"}, "row_count": 200, "challenger": 3.0, "champion": 2.0, "regression": 0.5}
        ],
    },
    "groups": [
        {
            "column": "sex",
            "groups": [{"group": "f", "row_count": 90, "mean_loss": 0.1}],
            "unmeasured": [
                {"group": "x", "row_count": 3, "rate": None},
                {"group": "f", "row_count": 9, "rate": "true positive rate of yes"},
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> PackageManifest:
    folder = tmp_path_factory.mktemp("packages") / "one"
    build_package(folder)
    return read_package(folder)


def card(manifest: PackageManifest, evaluation: dict[str, Any] | None = None, **more: Any) -> Page:
    given = {"model_name": "fare", "run_id": "run", "package_digest": "sha256:1"} | more
    return describe_model(manifest, evaluation=evaluation, **given)


class Seen(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(markdown: str) -> Seen:
    """As a renderer that lets raw HTML through shows it: the worst case."""
    return Seen(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


#: What GitHub's dialect, which Airflow's pages show, makes a link of in any text: remark-gfm's two patterns.
AUTOLINKS = re.compile(r"(?i)(https?://|www(?=\.))[-.\w]+|[-.\w+]+@[-\w]+(\.[-\w]+)+|(mailto|xmpp):\S")


def test_an_address_in_a_text_is_no_link() -> None:
    addresses = "https://evil.example/login HTTP://evil.example www.evil.example me@evil.example mailto:me@evil.example"
    assert all(AUTOLINKS.search(address) for address in addresses.split())
    assert not AUTOLINKS.search(rendered(markdown(addresses)).text)
    asked = describe_request(
        model_name="m",
        model_version="1",
        evaluation=ONE_METRIC | {"reason": addresses},
        changes=[Change(name=addresses, champion=addresses, challenger=None)],
        links={"Evaluation": "https://mlflow.example/run"},
        taken_back=addresses,
    )
    seen = rendered(asked)
    assert not AUTOLINKS.search(seen.text)
    assert [given["href"] for tag, given in seen.tags if tag == "a"] == ["https://mlflow.example/run"]


def test_it_says_what_was_measured(manifest: PackageManifest) -> None:
    made = card(manifest, ONE_METRIC, signed_by="abc", training={"seed": "7", "unset": "None"})
    for text in (rendered(made.to_markdown()).text, Seen(made.to_html()).text):
        assert "Predicts y (a number) from x, kind." in text
        assert "2.5 (2.4 to 2.6)" in text
        assert "95% interval" in text
        assert "+19.0%" in text
        assert "version 4" in text
        assert (
            "An improvement of mae by 0.2 would be found with these rows four times out of five; a smaller one less often"
            in text
        )
        assert "key abc" in text
        assert "seed" in text
        assert "unset" not in text
        assert manifest.files["model.onnx"] in text
        assert "Whether it treats groups of people alike was not measured." in text


def test_it_names_the_groups_nobody_could_measure(manifest: PackageManifest) -> None:
    words = "groups of sex, as they are of too few rows: x (3 rows), f, true positive rate of yes (9 rows)."
    assert words in rendered(card(manifest, EVERYTHING).to_markdown()).text


@pytest.mark.parametrize(
    ("measured", "words"),
    [("twin", "all numbers are the twin's"), ("predecessors", "was tested on none"), ("model", None)],
)
def test_it_says_what_was_not_measured_of_the_model_itself(
    manifest: PackageManifest, measured: str, words: str | None
) -> None:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    held_out = replace(
        manifest.holdout, window_start=start + timedelta(days=8), window_end=start + timedelta(days=10)
    )
    trained = replace(
        manifest.trained_on,
        time_column="t",
        window_start=start,
        window_end=start + timedelta(days=8 if words is None else 10),
    )
    found = replace(manifest, holdout=held_out, trained_on=trained)
    evaluation = ONE_METRIC | {"measured": measured}
    shown = card(found, evaluation).to_markdown()
    asked = describe_request(model_name="m", model_version="5", evaluation=evaluation, changes=(), links={})
    page = describe_evaluation(evaluation).to_markdown()
    assert ("rows it was not trained on" in shown) == (words is None)
    assert ("by a twin that was not trained on them; this model was" in shown) == (words is not None)
    for text in (shown, asked, page):
        assert ("Measured" in text.replace("Measured on the same rows", "")) == (words is not None)
        assert words is None or words in text


def test_it_says_everything_there_is(manifest: PackageManifest) -> None:
    made = card(manifest, EVERYTHING)
    for text in (rendered(made.to_markdown()).text, Seen(made.to_html()).text):
        assert "not measured: it gives no probabilities" in text
        assert "kind is worse" in text.replace("kind b is", "kind is")
        assert "Artifact: not measured. no service to ask" in text
        assert "kind b" in text
        assert "+50.0%" in text
        assert "Groups of sex" in text
        assert "was not measured" not in text


def test_without_an_evaluation_it_says_so(manifest: PackageManifest) -> None:
    text = card(manifest).to_markdown()
    assert "registered without an evaluation" in text
    assert card(manifest).verdict is None


@pytest.mark.parametrize(
    "evaluation",
    [
        {"verdict": "promote"},
        {"report": None, "checks": "none", "slices": 3, "groups": {"groups": [None]}, "others": [1, None]},
        {
            "report": {"deciding": {"metric": "mae", "challenger": None}, "not_measured": []},
            "slices": {"worst": [{"where": None}]},
            "checks": [{}],
        },
        {"report": {"deciding": {"metric": "mae", "challenger": {"value": None}, "champion": {"value": 3}}}},
        {
            "report": {
                "others": [{"metric": "mae", "challenger": {"value": float("nan")}, "baselines": {"a": None}}]
            }
        },
    ],
)
def test_whatever_shape_the_evaluation_has_there_is_a_card(
    manifest: PackageManifest, evaluation: dict[str, Any]
) -> None:
    made = card(manifest, evaluation)
    assert made.to_markdown().startswith("# fare")
    assert made.to_html().endswith("</html>\n")


class TestHostileNames:
    @pytest.fixture
    def hostile(self, manifest: PackageManifest) -> Page:
        signature = ModelSignature(
            inputs=tuple(FieldSpec(name=HOSTILE + str(index), type="number") for index in range(2)),
            output="y",
        )
        changed = replace(
            manifest,
            signature=signature,
            target=HOSTILE,
            known_rows=({HOSTILE: HOSTILE},),
            known_predictions=(1.0,),
            environment={HOSTILE: HOSTILE},
        )
        evaluation = EVERYTHING | {
            "verdict": HOSTILE,
            "reason": HOSTILE,
            "checks": [{"name": HOSTILE, "outcome": HOSTILE, "reason": HOSTILE}],
            "slices": {"loss": HOSTILE, "worst": [{"where": {HOSTILE: HOSTILE}, "row_count": HOSTILE}]},
            "groups": [
                {
                    "column": HOSTILE,
                    "groups": [{"group": HOSTILE, HOSTILE: HOSTILE}],
                    "unmeasured": [{"group": HOSTILE, "row_count": HOSTILE, "rate": HOSTILE}],
                }
            ],
            "report": {
                "deciding": {"metric": HOSTILE, "challenger": INTERVAL, "baselines": {HOSTILE: GUESS}},
                "not_measured": {HOSTILE: HOSTILE},
            },
        }
        return card(
            changed,
            evaluation,
            model_name=HOSTILE,
            run_id=HOSTILE,
            training={HOSTILE: HOSTILE},
            signed_by=HOSTILE,
        )

    def test_the_page_runs_nothing_and_loads_nothing(self, hostile: Page, manifest: PackageManifest) -> None:
        page = Seen(hostile.to_html())
        harmless = {tag for tag, _ in Seen(card(manifest, EVERYTHING).to_html()).tags}
        assert {tag for tag, _ in page.tags} <= harmless
        assert not {"script", "img", "a", "iframe", "link"} & harmless
        attributes = {name for _, given in page.tags for name in given}
        assert not [name for name in attributes if name.startswith("on") or name in {"href", "src", "style"}]
        assert "<script>alert(1)</script>" in page.text  # shown, not run
        assert "\u202e" not in hostile.to_html()

    def test_markdown_shows_it_as_text(self, hostile: Page, manifest: PackageManifest) -> None:
        page = rendered(hostile.to_markdown())
        harmless = {tag for tag, _ in rendered(card(manifest, EVERYTHING).to_markdown()).tags}
        assert {tag for tag, _ in page.tags} <= harmless
        assert not {"script", "img", "a", "code"} & harmless
        assert len([tag for tag, _ in page.tags if tag == "h1"]) == 1
        assert "<script>alert(1)</script>" in page.text


def test_a_short_description_ends_with_a_whole_section(manifest: PackageManifest) -> None:
    made = card(manifest, EVERYTHING)
    whole = made.to_markdown()
    assert made.to_markdown(len(whole)) == whole
    for maximum in (200, 800, 1500):
        short = made.to_markdown(maximum)
        assert len(short) <= maximum
        assert short.endswith("The rest is with the run's artifacts.\n")
    assert "## How good it is" in made.to_markdown(1500)
