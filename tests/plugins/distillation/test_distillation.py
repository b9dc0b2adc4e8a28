from __future__ import annotations


def test_base(run_it, lines, tiny_bases, tmp_path):
    run = run_it({"teacher": "base"})
    print(lines)
    print((run.directory / "metrics.jsonl").read_text())
    t = tiny_bases("teacher", seed=3, vocab_size=320)
    run = run_it({"teacher": str(t)}, "run2")
    print(lines[-12:])
    print((run.directory / "metrics.jsonl").read_text())
    run = run_it({"teacher": str(t), "cache": str(tmp_path / "c")}, "run3")
    print((run.directory / "metrics.jsonl").read_text())
    lines.clear()
    run = run_it({"teacher": str(t), "cache": str(tmp_path / "c")}, "run4")
    print(lines)
    print((run.directory / "metrics.jsonl").read_text())
    lines.clear()
    run = run_it({"teacher": f"base+{tmp_path / 'run' / 'adapter'}"}, "run5")
    print(lines)
    assert 0
