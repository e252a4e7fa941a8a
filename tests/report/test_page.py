"""The shell of pages: text stays text."""

import re

from moa_train.report.page import page, preformatted
from moa_train.runtime.text import escape, printable


def test_invisible_characters_are_written_as_escapes():
    assert printable("tench, Tinca tinca") == "tench, Tinca tinca"
    assert printable("Zürich 東京") == "Zürich 東京"
    assert printable("\x1b[31mred\n\u202eabc\udcff\u2028") == "\\x1b[31mred\\n\\u202eabc\\udcff\\u2028"


def test_markup_is_escaped():
    assert escape("<b a=\"1\" b='2'>&") == "&lt;b a=&quot;1&quot; b=&#x27;2&#x27;&gt;&amp;"
    assert preformatted("a\n<b>\x07") == '<pre tabindex="0">a\n&lt;b&gt;\\x07</pre>'


def test_data_cannot_end_its_element_and_nothing_is_loaded():
    text = page("<title>", "<p>body</p>", data={"name": "</script><script>alert(1)</script><!--"})
    assert text.count("</script>") == 2
    assert "alert" not in re.sub(r"\\u003c.*", "", text)
    assert "default-src 'none'" in text
    assert "&lt;title&gt;" in text
