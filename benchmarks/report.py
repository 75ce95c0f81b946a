"""The store benchmark's result as a table."""

from collections.abc import Iterator
from typing import Any

STEPS = ("raw write", "raw read", "published", "visible", "verified")


def table(result: dict[str, Any]) -> str:
    """Everything that the goals are about, in a hundred columns."""
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    device = result["device"]
    yield f"{device['cpu']}, {device['cores']} cores, load {device['load_average'][0]:.1f} at the start"
    yield f"S3: {result['s3_server']}"
    for kind, sizes in result["runs"].items():
        yield ""
        yield (
            f"{kind:<9}{'MB':>6}{'tensors':>9}"
            + "".join(f"{step:>11}" for step in STEPS)
            + (f"{'/ raw':>8}{'(rounds)':>14}{'no digests':>12}{'/ write':>9}")
        )
        for name, run in sizes.items():
            seconds = "".join(f"{run['seconds'][step]['median']:>11.3f}" for step in STEPS)
            ratio, rounds = result["publish_over_raw_copy"][kind][name], run["ratio_of_rounds"]
            spread = f"{rounds['min']:.2f}-{rounds['max']:.2f}"
            yield f"{name:<9}{run['bytes'] / 1e6:>6.0f}{run['tensors']:>9}{seconds}{ratio:>8.2f}{spread:>14}" + (
                f"{run['ratio_without_digests']:>12.2f}{run['publish_over_write']:>9.2f}"
            )
    for name, run in result.get("clients", {}).items():
        if isinstance(run, str):
            if name != "server":
                yield f"{name}: {run}"
        else:
            yield ""
            yield f"clients on {result['clients']['server']}, {name}: median seconds (least-most)"
            for step, seconds in run["seconds"].items():
                rate = f"{run['bytes'] / seconds['median'] / 1e6:>8.0f} MB/s" if "bytes" in run else ""
                yield f"  {step:<24}{seconds['median']:>8.3f} ({seconds['min']:.3f}-{seconds['max']:.3f}){rate}"
    yield ""
    file = result["adapter_file"]
    seconds = {name: of["median"] for name, of in file["seconds"].items()}
    for theirs, ours, steps, speedup in (
        ("save_file", "write, from a ready shard", ("write",), "writer"),
        ("save_file", "encode and write, from separate tensors", ("encode", "write"), "writer_from_tensors"),
        ("load_file", "map", ("map",), "reader"),
    ):
        our_s = " + ".join(f"{seconds[step]:.3f}" for step in steps)
        yield (
            f"{file['tensors']} tensors: {theirs} {seconds[theirs]:.3f} s; {ours} {our_s} s:"
            f" {result[f'{speedup}_speedup']:.1f}x (processor time {result[f'{speedup}_cpu_speedup']:.1f}x)"
        )
