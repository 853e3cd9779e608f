"""What the chat page makes of Markdown: what a reference makes of it, nothing that could act, in linear time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from browsing import Scripted, chromium, opened
from markdown_it import MarkdownIt
from serving import served

# Structure without what is the page's own: wrappers of code and tables, levels of headings, tooltips.
OUTLINE = """() => {
window.outline = (root) => {
  const lines = [];
  const walk = (node, depth) => {
    for (const child of node.childNodes) {
      if (child.nodeType === 3) {
        const text = child.data.replace(/\\s+/g, " ").trim();
        if (text) lines.push(" ".repeat(depth) + JSON.stringify(text));
        continue;
      }
      const name = child.localName;
      if (child.className === "code-head") continue;
      if (name === "div") { walk(child, depth); continue; }
      const level = child.className.match?.(/level-(\\d)/)?.[1];
      const label = (level ? `h${level}` : name === "del" ? "s" : name)
        + (child.getAttribute("href") ? ` ${child.getAttribute("href")}` : "")
        + (child.getAttribute("start") ? ` ${child.getAttribute("start")}` : "");
      lines.push(" ".repeat(depth) + label);
      walk(child, depth + 1);
    }
  };
  walk(root, 0);
  return lines;
};
}"""
LOAD = "async () => { const {Prose} = await import('/page/prose.js'); window.Prose = Prose; }"

SAMPLES = {
    "inline": "Some *thin*, **thick**, ***both***, ~~gone~~ and `code * here` text, a_b_c and 2 * 3 * 4.",
    "emphasis in emphasis": "**bold with *italic* inside** and *italic with **bold** inside*, __also__ _here_",
    "unbalanced": "**open and *never closed, a * b, ** c, *** d, _e",
    "escapes": r"\*no\* \`no\` \[no](there) 1\. \# and C:\temp &amp; &lt;b&gt;",
    "code spans": "`` a ` b `` and ```x``` and ` y ` and `open",
    "links": '[one](https://example.com/a_b_c) and [**two**](http://example.com/x(y)z "title") <https://example.com/>',
    "headings": "# One\n\n## Two ##\n\n###### Six\n\n####### seven\n\n#none",
    "tight lists": "- a\n- b\n  - c\n  - d\n    - e\n- f\n\nafter",
    "loose list": "1. a\n\n   more\n\n2. b\n\nafter",
    "numbers": "3. three\n4. four\n\n\n7) other",
    "list with code": "1. Do this:\n\n   ```sh\n   ls -l\n   ```\n\n2. Then that",
    "quotes": "> one\n> two\n>\n> - three\n> > four",
    "code": "```python\ndef f():\n    return '<b>'\n\n\n# no heading\n```\nafter\n\n~~~\n```\n~~~",
    "indented code": "text\n\n    a\n      b\n\n    c\n\ntext",
    "open code": "```\nstill being written *here*",
    "table": "before\n\n| a | **b** | c |\n|---|:-:|--:|\n| 1 | `x` | 3 |\n| 4 | y \\| z | 6 |\n\nafter",
    "rules": "a\n\n---\n\n***\n\n_ _ _\n\nb",
    "line breaks": "one\ntwo  \nthree\\\nfour",
    "raw html": "<script>alert(1)</script>\n\n<img src=x onerror=alert(1)> <b>text</b>",
    "chinese": "你好，**世界**。这是*斜体*和`代码`。\n\n1. 第一\n2. 第二\n\n| 甲 | 乙 |\n|---|---|\n| 一 | 二 |",
    "emphasis before chinese": "这是 **重要** 的",
}

HOSTILE = {
    "stars": "*" * 100_000,
    "stars and letters": "*a " * 33_000,
    "closing stars": "*a" * 25_000 + "a*" * 25_000,
    "mixed runs": "**a *b _c __d " * 7_000,
    "backticks": "`" * 100_000,
    "rising backticks": " ".join("`" * size for size in range(1, 440)),
    "brackets": "[" * 100_000,
    "open links": "[a](" * 25_000,
    "links in links": "[" * 40_000 + "](https://example.com/)" * 2_600,
    "quotes": ">" * 100_000,
    "quote lines": "> > > > > > > > > > > >\n" * 4_000,
    "bullets": "- " * 50_000,
    "stairs": "".join(" " * (depth % 200) + "- a\n" for depth in range(1_000)),
    "numbers": "1. a\n" * 20_000,
    "pipes": "|" * 100_000,
    "wide table": "|a" * 5_000 + "|\n" + "|-" * 5_000 + "|\n" + "|b\n" * 20_000,
    "long table": "|a|b|\n|-|-|\n" + "|\n" * 45_000,
    "spaces": "a" + " " * 100_000 + "b",
    "heading": "#" + " #" * 50_000 + " a",
    "addresses": "http://" * 14_000,
    "entities": "&" * 100_000,
    "angles": "<http://" * 12_000 + "<br" * 1_000,
    "formulas": "\\(" * 50_000,
    "dollars": "$$" * 50_000,
    "tildes": "~~a" * 33_000,
    "fences": "```\n" * 25_000,
    "lines": "\n" * 100_000,
    "tabs": "\t" * 100_000,
    "many elements": "*a*b" * 120_000,
}


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with served(Scripted()) as running, chromium() as browser, opened(browser, running) as page:
        page.evaluate(OUTLINE)
        page.evaluate(LOAD)
        yield page


@pytest.mark.parametrize("name", SAMPLES)
def test_a_text_has_the_structure_that_a_reference_gives_it(page: Any, name: str) -> None:
    reference = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    wanted, shown = page.evaluate(
        """([text, html]) => {
          const root = document.createElement("div");
          new Prose(root).show(text);
          return [outline(new DOMParser().parseFromString(html, "text/html").body), outline(root)];
        }""",
        [SAMPLES[name], re.sub(' style="[^"]*"', "", reference.render(SAMPLES[name]))],
    )
    assert shown == wanted


@pytest.mark.parametrize(
    ("text", "html"),
    [
        (
            "**“引号”**之后",
            "<p><strong>“引号”</strong>之后</p>",
        ),  # CommonMark wants a space there, which Chinese has not
        (r"so \(a_1 * b_1 * c\) is", r'<p>so <code class="math">\(a_1 * b_1 * c\)</code> is</p>'),
        ("one<br>two", "<p>one<br>two</p>"),
        ("![a picture](https://example.com/x.png)", None),
    ],
)
def test_where_the_page_differs_on_purpose(page: Any, text: str, html: str | None) -> None:
    shown = page.evaluate(
        "(text) => { const root = document.createElement('div'); new Prose(root).show(text); return root.innerHTML; }",
        text,
    )
    if html is None:
        assert "<img" not in shown
        assert 'href="https://example.com/x.png"' in shown
    else:
        assert shown == html


def test_a_text_that_grows_ends_up_as_if_shown_at_once(page: Any) -> None:
    differing = page.evaluate(
        """(samples) => {
          const differing = [];
          for (const text of samples) {
            const grown = document.createElement("div");
            const prose = new Prose(grown);
            for (let end = 1; end <= text.length; end += 1) {
              prose.show(text.slice(0, end));
              const once = document.createElement("div");
              new Prose(once).show(text.slice(0, end));
              if (grown.innerHTML !== once.innerHTML) { differing.push(text.slice(0, end)); break; }
            }
          }
          return differing;
        }""",
        [*SAMPLES.values(), "\n\n".join(SAMPLES.values())[:900]],
    )
    assert differing == []


def test_what_is_complete_is_not_touched_while_the_text_grows(page: Any) -> None:
    kept = page.evaluate(
        """() => {
          const root = document.createElement("div");
          const prose = new Prose(root);
          prose.show("# One\\n\\nTwo\\n\\n```\\ncode");
          const before = [...root.children].concat(root.querySelector("pre code").firstChild);
          prose.show("# One\\n\\nTwo\\n\\n```\\ncode goes on\\n```\\n\\nThree");
          const after = [...root.children].slice(0, 3).concat(root.querySelector("pre code").firstChild);
          return before.length === 4 && before.every((node, place) => node === after[place]);
        }"""
    )
    assert kept


def test_no_text_makes_an_element_or_attribute_that_is_not_foreseen(page: Any) -> None:
    """Random texts of the characters that mean something, and of pieces of attacks."""
    found = page.evaluate(
        """() => {
          const parts = ["*", "**", "_", "~~", "`", "```", "[", "](", ")", "<", ">", "!", "#", "- ", "1. ", "|", "\\n",
            "\\n\\n", "    ", "a", " ", "\\\\", "&lt;", "|-|-|", "https://a.b/", "javascript:alert(1)",
            "data:text/html,x", "<script>", "<img src=x onerror=alert(1)>", "\\"", "$$", "\\\\(", "\\\\)", "<br>",
            "JaVaScRiPt:", "\\u0000"];
          let state = 7;
          const random = (size) => (state = (state * 48271) % 2147483647) % size;
          const names = new Set(), addresses = new Set();
          for (let round = 0; round < 1500; round += 1) {
            const text = Array.from({length: 3 + random(40)}, () => parts[random(parts.length)]).join("");
            const root = document.createElement("div");
            new Prose(root).show(text);
            for (const each of root.querySelectorAll("*")) {
              names.add(each.localName);
              for (const attribute of each.attributes) names.add(`@${attribute.name}`);
              if (each.hasAttribute("href") && each.localName === "a") addresses.add(new URL(each.href).protocol);
            }
          }
          return [[...names], [...addresses]];
        }"""
    )
    names = "p h3 h4 h5 h6 ul ol li blockquote hr pre code div span button svg use table thead tbody tr th td em strong"
    attributes = "class href title target rel type aria-label aria-hidden role tabindex start"
    allowed = {*names.split(), "del", "a", "br", *(f"@{name}" for name in attributes.split())}
    assert set(found[0]) <= allowed
    assert "a" in found[0]
    assert set(found[1]) <= {"https:", "http:"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_costs_no_more_than_its_length(page: Any, name: str) -> None:
    """Compared with harmless text of that length; quadratic time would be thousands of times as much."""
    hostile, harmless = page.evaluate(
        """([text, other]) => [text, other].map((each) => {
          const start = performance.now();
          const root = document.createElement("div");
          new Prose(root).show(each);
          return performance.now() - start;
        })""",
        [HOSTILE[name], "Some *plain* text with `code`, and more of it.\n\n" * 2_000],
    )
    assert hostile < 60 * harmless + 100  # milliseconds
