"""Prompt files, whatever wrote them."""

from sdpo.data import prompts


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path):
    file = tmp_path / "asked.txt"
    file.write_bytes("\ufeffWhy?\r\n\r\nA page\x0cand\u2028a line.\r\n".encode())
    assert prompts.read(str(file)) == [(1, ["Why?"], "asked"), (3, ["A page\x0cand\u2028a line."], "asked")]
