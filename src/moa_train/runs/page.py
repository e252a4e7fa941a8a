"""The frame of a page: a title, sections, and a style sheet for light and dark themes and for phones."""

from collections.abc import Iterable

from moa_train.runtime.text import escape

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2127; --quiet: #5b6570; --line: #d9dee3; --soft: #f4f6f8;
  --good: #0a6d4b; --bad: #a83a00; }
@media (prefers-color-scheme: dark) { :root { --back: #14181c; --text: #e4e8ec; --quiet: #9aa5b0; --line: #333b43;
  --soft: #1d2329; --good: #5fd0a5; --bad: #ff9a66; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1.2rem clamp(0.8rem, 3vw, 2rem) 3rem; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 0.2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; overflow-wrap: anywhere; }
p { margin: 0.3rem 0; } .quiet { color: var(--quiet); } .good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--quiet); font-weight: 500; vertical-align: bottom; }
th.name, td.name, th.text, td.text { text-align: left; }
td.name { white-space: normal; overflow-wrap: anywhere; min-width: min(14rem, 48vw); }
.mark { display: inline-block; position: relative; padding-left: 1.2em; }
.mark::before { content: ""; position: absolute; left: 0; top: 0.38em; width: 0.8em; height: 0.8em; border-radius: 2px;
  background: var(--mark); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; color: var(--text); }
figcaption { color: var(--quiet); margin-bottom: 0.2rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; margin-bottom: 0.8rem; }
details { margin: 0.6rem 0; } summary { cursor: pointer; color: var(--quiet); }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; }
pre { background: var(--soft); padding: 0.6rem 0.8rem; overflow-x: auto; border-radius: 4px; }
ul { padding-left: 1.2rem; margin: 0.3rem 0; } li { overflow-wrap: anywhere; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """Return a complete page that needs no network access.

    Args:
        title: plain text.
        body: HTML.
    """
    content = "\n".join(body)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{content}
</body>
</html>
"""
