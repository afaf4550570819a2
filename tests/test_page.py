"""page: made-up result files in, index.html out; it is parsed here as a browser would, and its numbers are recomputed."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
import urllib.parse
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure
from test_report import make_result, save
from test_tuning import tune, validation

from wdkd import document, page, report
from wdkd.page_assets import SCRIPT, SORTED
from wdkd.published import ACCURACY

VOID = {"meta", "img"}
ALLOWED = {"html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "script"}
ALLOWED |= {"h1", "h2", "h3", "h4", "p", "code", "strong", "ul", "li", "a", "div", "img"}
ALLOWED |= {"table", "thead", "tbody", "tfoot", "tr", "th", "td"}


class Page(html.parser.HTMLParser):
    """The elements of a page: tag, attributes, text, identifiers of the sections around. Fails where tags do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.declared = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_decl(self, declaration):
        self.declared.append(declaration)

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        element = {"tag": tag, **dict(attributes), "text": "", "path": [e.get("id") for e in self.open if e["tag"] == "section"]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [e for e in self.elements if e["tag"] == tag]

    def table(self, section):
        """(headings, rows) of the first table of a section; rows are lists of cells."""
        place = next(i for i, e in enumerate(self.elements) if e["tag"] == "table" and e["path"][-1] == section)
        rows = []
        for e in self.elements[place + 1 :]:
            if e["tag"] == "table":
                break
            if e["tag"] == "tr":
                rows.append([])
            elif e["tag"] in ("th", "td"):
                rows[-1].append(e)
        return [cell["text"] for cell in rows[0]], rows[1:]

    def column(self, section, heading):
        """The cells of a column by the name of their row."""
        head, rows = self.table(section)
        return {row[0]["text"]: row[head.index(heading)] for row in rows}


@pytest.fixture(scope="module")
def results():
    """Four methods with three seeds on two sizes; kd is between the others."""
    rng = np.random.default_rng(1)
    level = {"ce": 0.7, "kd": 0.8, "wdkd": 0.81, "sobolev": 0.805}
    return [make_result(m, n, s, a + rng.normal() * 0.004) for m, a in level.items() for n in (50, None) for s in range(3)]


@pytest.fixture(scope="module")
def root(tmp_path_factory, results):
    """The directory of a report on these, on a longer schedule of two methods, and on tuning."""
    root = tmp_path_factory.mktemp("results")
    save(root, results)
    save(root / "long", [make_result(m, 50, 0, a) for m, a in (("kd", 0.85), ("ab", 0.86))])
    tune(
        root,
        [validation(50, s, 0.7 - abs(e - 0.01) + t / 100, e, temperature=t) for e in (0.0, 0.01, 0.1) for t in (1.0, 4.0) for s in (0, 1)],
    )
    report.whole_report(root)
    return root


@pytest.fixture(scope="module")
def parsed(root):
    return Page((root / "index.html").read_text())


MAIN = "results/fashion_mnist-track-plain"
ACCURACIES = f"{MAIN}/accuracy-on-the-test-images"
TUNING = f"{MAIN}-tuning-on-validation-images"


def accuracies(results, method, n):
    return [100 * r.evaluation.accuracy for r in results if (r.method, r.n_per_class) == (method, n)]


def test_it_is_a_whole_document_of_known_elements(parsed, root):
    assert parsed.declared == ["DOCTYPE html"] and {e["tag"] for e in parsed.elements} <= ALLOWED
    ids = [e["id"] for e in parsed.elements if "id" in e]
    assert len(ids) == len(set(ids)) and len(ids) >= 20
    assert (root / "index.html").stat().st_size < 500_000


def test_accuracies_are_those_of_the_files_beside_the_published_ones(parsed, results):
    for n, heading in ((50, "50"), (None, "full")):
        column = parsed.column(ACCURACIES, heading)
        for method in ("ce", "kd", "wdkd", "sobolev"):
            values = accuracies(results, method, n)
            assert float(column[method]["data-key"]) == pytest.approx(np.mean(values), abs=1e-9)
            assert column[method]["text"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} (3)"
        for method, paper in ACCURACY["fashion_mnist"].items():
            cell = column[f"{method}, published"]
            assert float(cell["data-key"]) == paper[n] and cell["class"] == "published"
        best = max(("ce", "kd", "wdkd", "sobolev"), key=lambda m: np.mean(accuracies(results, m, n)))
        assert [name for name, cell in column.items() if cell.get("class") == "best"] == [best] and column["best here"]["text"] == best
    assert column["fitnet"]["text"] == "not run" and "data-key" not in column["fitnet"]


def test_differences_agreement_and_calibration(parsed, results):
    column = parsed.column(f"{MAIN}/paired-difference-from-kd-points", "50")
    test = scipy.stats.ttest_rel(accuracies(results, "wdkd", 50), accuracies(results, "kd", 50))
    low, high = test.confidence_interval(0.95)
    mean = np.mean(accuracies(results, "wdkd", 50)) - np.mean(accuracies(results, "kd", 50))
    assert column["wdkd"]["text"] == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] (3)"
    assert float(column["wdkd"]["data-key"]) == pytest.approx(mean, abs=1e-9)
    for section, field in (("agreement-with-the-teacher", "agreement"), ("expected-calibration-error", "ece")):
        values = [100 * getattr(r.evaluation, field) for r in results if (r.method, r.n_per_class) == ("kd", 50)]
        assert float(parsed.column(f"{MAIN}/{section}", "50")["kd"]["data-key"]) == pytest.approx(np.mean(values), abs=1e-9)


def test_a_longer_schedule_has_a_chapter_of_its_own(parsed):
    column = parsed.column("long-schedule/fashion_mnist-track-plain/accuracy-on-the-test-images", "50")
    assert (column["kd"]["text"], column["ab"]["text"], column["ce"]["text"]) == ("85.00 (1)", "86.00 (1)", "not run")


def test_the_tuning_record_is_there(parsed):
    head, rows = parsed.table(f"{TUNING}/all-that-was-tried-wdkd-50-images-per-class")
    assert head == ["temperature", "epsilon", "accuracy", "gain", "choice"] and len(rows) == 6
    assert [row[1]["data-key"] for row in rows if row[4]["text"] == "chosen"] == ["0.01"]
    assert float(rows[0][2]["data-key"]) == pytest.approx(100 * (0.7 - 0.01 + 0.01))
    assert parsed.column(f"{TUNING}/chosen", "temperature")["50"]["text"] == "4"


def test_contents_lead_to_every_data_set_and_track(parsed):
    targets = {e["id"] for e in parsed.all("section")}
    links = [urllib.parse.unquote(e["href"]) for e in parsed.all("a")]
    assert all(link[0] == "#" and link[1:] in targets for link in links)
    assert {f"#{MAIN}", f"#{TUNING}", "#long-schedule", "#long-schedule/fashion_mnist-track-plain"} <= set(links)


def test_nothing_is_loaded_and_one_script_may_run(parsed):
    (policy,) = [e["content"] for e in parsed.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:") and "script-src 'sha256-" in policy
    assert [e["text"] for e in parsed.all("script")] == [SCRIPT]
    assert all(e["src"].startswith("data:image/svg+xml,") for e in parsed.all("img"))
    assert not re.search(r"url\(|@import|https?:", "".join(e["text"] for e in parsed.all("style")))
    assert not [e for e in parsed.elements if "src" in e and e["tag"] != "img" or "style" in e or any(name.startswith("on") for name in e)]


def test_plots_are_drawings_with_their_labels_and_described(parsed):
    drawings = [ElementTree.fromstring(urllib.parse.unquote_to_bytes(e["src"].split(",", 1)[1])) for e in parsed.all("img")]
    texts = [{t.text for t in drawing.iter("{http://www.w3.org/2000/svg}text")} for drawing in drawings]
    assert len(drawings) == 3 and all("accuracy" in e["alt"] for e in parsed.all("img"))
    assert {"ce (no teacher)", "wdkd", "fashion_mnist, track plain"} <= texts[0] and "0.01" in texts[1] and "ab" in texts[2]


def test_whatever_a_drawing_refers_to_is_in_it_and_only_that_is_named(parsed):
    for image in parsed.all("img"):
        drawing = urllib.parse.unquote(image["src"])
        referred = set(re.findall(r"""(?:href="|url\()#([^")]+)""", drawing))
        names = re.findall(r' id="([^"]*)"', drawing)
        assert len(names) == len(set(names)) and set(names) == referred and len(names) > 3


def test_an_address_ends_neither_its_attribute_nor_itself():
    figure = Figure()
    figure.suptitle("50 % of 'a' & \"b\" #1 <é>\\")
    address = page.image_address(document.Plot("a.png", "a title", lambda: figure))
    assert set(address).isdisjoint("'&#\n\\") and address.isascii() and address.isprintable()
    drawing = ElementTree.fromstring(urllib.parse.unquote_to_bytes(address.split(",", 1)[1]))
    assert "50 % of 'a' & \"b\" #1 <é>\\" in {t.text for t in drawing.iter("{http://www.w3.org/2000/svg}text")}


def test_tables_can_be_scrolled_and_named_by_the_keyboard(parsed):
    regions = [e for e in parsed.all("div") if e.get("role") == "region"]
    assert len(regions) == len(parsed.all("table")) and all(e["tabindex"] == "0" and e["aria-label"] for e in regions)
    assert all(e["scope"] in ("col", "row") for e in parsed.all("th"))


def test_the_same_files_give_the_same_bytes(root, results, tmp_path):
    for place in sorted((p for p in root.rglob("*.json")), reverse=True):  # Made in another order, in another directory.
        (tmp_path / place.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place, tmp_path / place.relative_to(root))
    report.whole_report(tmp_path, tuning=True)
    again = (tmp_path / "index.html").read_bytes()
    report.whole_report(tmp_path)
    assert again == (root / "index.html").read_bytes() == (tmp_path / "index.html").read_bytes()
    for end in ("md", "csv", "png"):
        assert (tmp_path / f"fashion_mnist/plain.{end}").read_bytes() == (root / f"fashion_mnist/plain.{end}").read_bytes()


# --- Hostile files -----------------------------------------------------------------------------------------------------------

SNIPPETS = ("<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>", "</style></table><!--", "`</code><b>`", "&lt;&#60;", "]]>")


def test_text_from_files_is_nothing_but_text(tmp_path):
    fields = ("model", "device_kind", "teacher_hash")
    runs = [make_result("kd", 50, s, **dict.fromkeys(fields, text)) for s, text in enumerate(SNIPPETS)]
    runs += [make_result("ab", 50, s, status="diverged", reason=t, evaluation=None, parameter_hash=None) for s, t in enumerate(SNIPPETS)]
    names = [
        dataclasses.replace(r, evaluation=dataclasses.replace(r.evaluation, class_names=list(SNIPPETS) + list("abcd"))) for r in runs[:6]
    ]
    save(tmp_path, [*names, *runs[6:]])
    report.whole_report(tmp_path)
    parsed = Page((tmp_path / "index.html").read_text())
    assert {e["tag"] for e in parsed.elements} <= ALLOWED and [e["text"] for e in parsed.all("script")] == [SCRIPT]
    assert not [e for e in parsed.elements if any(name.startswith("on") for name in e)]
    (body,) = (e["text"] for e in parsed.all("main"))
    assert all(body.count(text.replace("`", "")) >= 4 for text in SNIPPETS)
    markdown = (tmp_path / "fashion_mnist/plain.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown and markdown.count("&lt;script>") >= 4


def test_cells_headings_and_titles_are_escaped():
    cell = document.Cell("<i>1</i>", '"><i>')
    section = document.Section('<b id="x">', [document.Table(["<u>"], [[cell], [cell]]), document.Bullets(["<s>"], warning=True), "<em>"])
    parsed = Page(page.html_page([document.Section("Part", [section])]))
    assert {e["tag"] for e in parsed.elements} <= ALLOWED
    assert [e["text"] for e in parsed.all("h3")] == ['<b id="x">'] and parsed.all("td") == []
    assert [(e["text"], e["data-key"]) for e in parsed.all("th")[1:]] == [("<i>1</i>", '"><i>')] * 2


# --- Sorting -----------------------------------------------------------------------------------------------------------------


def keys_of(parsed, section, heading):
    head, rows = parsed.table(section)
    return [
        (row[0]["text"], row[head.index(heading)].get("data-key"))
        for row in rows
        if "scope" in row[0] and "published" not in row[0]["text"]
    ]


def test_keys_sort_as_the_means_do(parsed, results):
    keys = {name: float(key) for name, key in keys_of(parsed, ACCURACIES, "50") if key is not None}
    assert sorted(keys, key=keys.get) == sorted(keys, key=lambda m: np.mean(accuracies(results, m, 50))) and len(keys) == 4


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("descending", [False, True])
def test_the_script_sorts_numbers_by_size_and_what_has_no_key_last(parsed, descending):
    keys = [key for _, key in keys_of(parsed, ACCURACIES, "50")]
    cases = [keys, ["10", "9", "-1", "1e-3", None, "0"], ["b", "kl", "10", "a", None, "9"], ["1", None, "1", None, "1"], []]
    code = (
        f"{SORTED}\nconst cases = {json.dumps(cases)}.map((keys) => keys.map((key) => key ?? undefined));\n"
        f"console.log(JSON.stringify(cases.map((keys) => sortedRows(keys, {json.dumps(descending)}))));"
    )
    done = subprocess.run(["node", "-"], input=code, capture_output=True, text=True, timeout=120, check=True)
    for case, found in zip(cases, json.loads(done.stdout), strict=True):
        assert sorted(found) == list(range(len(case)))
        present = [row for row, key in enumerate(case) if key is not None]
        assert found[len(present) :] == [row for row, key in enumerate(case) if key is None]
        rank = {row: (0, float(case[row]), "") if re.match(r"[-\d]", case[row]) else (1, 0.0, case[row]) for row in present}
        expected = sorted(present, key=rank.get)
        if descending:
            expected = sorted(present, key=lambda row: (list(sorted(set(rank.values()))).index(rank[row])) * -1)
        assert found[: len(present)] == expected


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_clicks_on_a_heading_sort_reverse_and_restore(root, tmp_path, parsed):
    """In a browser, on the page without its policy, which would not let the clicks of this test run."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", (root / "index.html").read_text())
    clicks = """<script>
      const table = document.querySelector("table"), head = table.tHead.rows[0].cells[1], seen = [];
      for (let click = 0; click < 3; click++) {
        head.querySelector("button").click();
        seen.push([head.getAttribute("aria-sort"), ...[...table.tBodies[0].rows].map((row) => row.cells[0].textContent)]);
      }
      document.title = JSON.stringify(seen);
    </script>"""
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{clicks}</body>"))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=600, check=True)
    seen = json.loads(re.search(r"<title>(.*)</title>", done.stdout)[1].replace("&amp;", "&"))
    _, rows = parsed.table(ACCURACIES)
    body = [row for row in rows if row[0]["text"] not in ("best here", "minus published wdkd")]
    keyed = [row for row in body if "data-key" in row[1]]
    rest = [row[0]["text"] for row in body if "data-key" not in row[1]]
    down = [row[0]["text"] for row in sorted(keyed, key=lambda row: -float(row[1]["data-key"]))]
    assert seen == [["descending", *down, *rest], ["ascending", *down[::-1], *rest], ["none", *(row[0]["text"] for row in body)]]
