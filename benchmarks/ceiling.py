"""What the processor can do, measured: a worker. Matrix products, forward convolutions and copies at their best size,
by the same library (torch with oneDNN) that the PyTorch sides compute with."""

import time

from benchmarks.timing import main_of_worker

SIZES = (512, 1024, 2048, 4096)  # of square matrices
# Channels in, channels out, side of the map: 3×3 convolutions as the notes' networks and wider ones have them.
CONVOLUTIONS = ((32, 64, 32), (64, 128, 16), (128, 256, 8), (256, 512, 4), (256, 256, 16), (512, 512, 8))
BATCH = 128
COPY_BYTES = 2**28
SECONDS = 0.3  # for each case


def measure(threads, precisions=("bfloat16", "float32")):
    import torch
    import torch.nn.functional as F

    if threads:
        torch.set_num_threads(threads)
    found = {}
    with torch.inference_mode():
        for name in precisions:
            dtype, products = getattr(torch, name), {}
            for n in SIZES:
                a, b, out = (torch.rand(n, n).to(dtype) for _ in range(3))
                products[f"{n}"] = 2 * n**3 / best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) / 1e9
            convolutions = {}
            for inputs, outputs, side in CONVOLUTIONS:
                x = torch.rand(BATCH, side, side, inputs).to(dtype).permute(0, 3, 1, 2)
                w = torch.rand(outputs, inputs, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
                flop = 2 * 9 * inputs * outputs * side * side * BATCH
                seconds = best_seconds(lambda x=x, w=w: F.conv2d(x, w, padding=1))
                convolutions[f"{inputs}→{outputs} at {side}×{side}"] = flop / seconds / 1e9
            found[name] = {"product": best(products), "convolution": best(convolutions)}
        source, target = torch.zeros(COPY_BYTES, dtype=torch.uint8), torch.ones(COPY_BYTES, dtype=torch.uint8)
        found["copy_gigabytes_per_second"] = COPY_BYTES / best_seconds(lambda: target.copy_(source)) / 1e9
    found["threads"] = torch.get_num_threads()
    return found


def best_seconds(work):
    """The shortest of the times that fit into SECONDS, after two to warm up."""
    work(), work()
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def best(rates):
    """The best case: its name and its GFLOP/s."""
    return max(rates.items(), key=lambda case: case[1])


if __name__ == "__main__":
    main_of_worker(measure)
