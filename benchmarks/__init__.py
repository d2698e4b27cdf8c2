"""What fromzero costs, beside what others cost on the same machine in the same run: `make bench`.

networks    the notes' networks as plain data, for all sides alike; their work in multiply-adds
timing      a stopwatch for a loop of steps; processes that measure one thing each and print it as JSON
steps_torch, steps_keras   the sides: fromzero, plain PyTorch, Keras on TensorFlow
ceiling     what the processor can do: matrix products, convolutions, copies
lifetime    whole runs: process start to printed result, start-up, memory, what evaluating costs, whether time is linear
figures     medians, ratios pair by pair, targets and verdicts
page        docs/benchmarks.md and its picture, from the figures
precision.toml   whether bfloat16 learns as well as float32: a study
pictures, tutorial_keras, pretrained   folders of pictures: fromzero, Keras's tutorial, a network trained before
"""
