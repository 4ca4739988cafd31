"""A report's page as a browser reads it: tables, pictures, scripts, links."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr", "wbr"}
OPTIONAL = {"thead", "tbody", "tfoot", "tr", "th", "td", "li", "p"}
"""Elements that HTML closes implicitly at the next one."""


class Page(HTMLParser):
    """Tables, scripts and links of a page; an element that is not closed in order fails the test."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.bold: list[str] = []
        self.scripts: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.pictures: list[list[str]] = []
        """Title and description."""
        self.items: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in VOID | OPTIONAL:
            self._open.append(tag)
        if "id" in given:
            self.anchors.append(given["id"])
        self.loads += [given[name] for name in ("src", "data", "srcset", "action", "xlink:href") if name in given]
        (self.links if tag in ("a", "use") else self.loads).extend([given["href"]] if "href" in given else [])
        assert not [name for name in given if name.startswith("on") or name == "style"]
        if tag in OPTIONAL:
            self._end_cell()
            self._in_cell = tag in ("th", "td")
        if tag == "table":
            self._rows = self.tables.setdefault(given.get("aria-label", f"table {len(self.tables)}"), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")
        elif tag == "svg":
            self.pictures.append(["", ""])
        elif tag == "li":
            self.items.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag in OPTIONAL or tag == "table":
            self._end_cell()
        if tag not in VOID | OPTIONAL:
            assert self._open.pop() == tag

    def _end_cell(self):
        if self._in_cell:
            self._rows[-1][-1] = self._rows[-1][-1].rstrip("\n")
        self._in_cell = False

    def handle_data(self, data):
        innermost = self._open[-1:]
        if "script" in self._open:
            self.scripts[-1] += data
        elif "svg" in self._open and innermost[0] in ("title", "desc"):
            self.pictures[-1][innermost[0] == "desc"] += data
        elif self._in_cell:
            self._rows[-1][-1] += data
            if innermost == ["b"]:
                self.bold.append(data)
        elif "ul" in self._open and self.items:
            self.items[-1] = (self.items[-1] + data).rstrip("\n")
        self.text += data
