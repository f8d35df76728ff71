"""The interpolation barrier between networks of different seeds on MNIST: before, after weight and
activation matching, and with REPAIR (batch norm: statistics estimated again).

    OMP_NUM_THREADS=1 python benchmarks/barrier.py --pairs 3

A barrier is the largest excess of the loss on the way from one network to the other over the
straight line between their losses (Ainsworth et al. 2023, definition 2.1).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.datasets import ImageData, load_data
from zoo.fusion.align import Graph, match_activations, match_weights, permute, trace
from zoo.fusion.align.repairing import repaired
from zoo.fusion.merging import pooled
from zoo.fusion.norms import norm_keys
from zoo.fusion.weights.average import average

State = dict[str, Tensor]
Data = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False),
                                      nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width),
                         nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def cnn(width: int, *, norm: bool) -> nn.Module:
    """Three convolutions, VGG-like: with batch norm, or with biases."""
    layers: list[nn.Module] = []
    for into, out, stride in ((1, width, 2), (width, 2 * width, 1), (2 * width, 2 * width, 1)):
        layers += [nn.Conv2d(into, out, 3, stride, 1, bias=not norm)]
        layers += [nn.BatchNorm2d(out)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width, 10))


def resnet(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                         Block(width, width, 1), Block(width, 2 * width, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


NETWORKS = {
    "MLP, width 32": lambda: mlp(32),
    "MLP, width 512": lambda: mlp(512),
    "CNN without norm, width 32": lambda: cnn(32, norm=False),
    "CNN with batch norm, width 8": lambda: cnn(8, norm=True),
    "CNN with batch norm, width 32": lambda: cnn(32, norm=True),
    "ResNet, width 8": lambda: resnet(8),
    "ResNet, width 32": lambda: resnet(32),
}


def trained(build: Callable[[], nn.Module], seed: int, data: Data, epochs: int) -> nn.Module:
    """A network from this seed: its start and the order of its images."""
    torch.manual_seed(seed)
    net = build()
    images, labels = data
    steps = epochs * (len(images) // 100)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def ways(
    net: nn.Module, one: State, other: State, graph: Graph, batches: Sequence[Tensor], seed: int
) -> dict[str, State]:
    """The second network, permuted in each way."""
    keys = [key for key, tensor in one.items()
            if tensor.is_floating_point() and key not in norm_keys(net)]
    by_weights = match_weights(one, other, graph, keys=keys, restarts=3, seed=seed)
    by_activations = match_activations(net, one, other, graph, batches)
    return {"none": other, "weights": permute(other, graph, by_weights),
            "activations": permute(other, graph, by_activations)}


def between(one: State, other: State, net: nn.Module, alpha: float) -> State:
    state = dict(one)
    for key, tensor in one.items():
        pair = [tensor, other[key]]
        if key in norm_keys(net):
            state[key] = pooled([one, other], key, [1 - alpha, alpha])
        elif tensor.is_floating_point():
            state[key] = average(pair, base=None, key=key, weight=[1 - alpha, alpha])
    return state


@torch.no_grad()
def measured(net: nn.Module, state: Mapping[str, Tensor], data: Data) -> tuple[float, float]:
    """Loss, and accuracy in per cent."""
    logits = torch.cat([torch.func.functional_call(net, dict(state), (images,))
                        for images in data[0].split(200)])
    accuracy = (logits.argmax(1) == data[1]).double().mean()
    return float(F.cross_entropy(logits, data[1])), 100 * float(accuracy)


def path(
    net: nn.Module, one: State, other: State, test: Data, alphas: Sequence[float],
    batches: Sequence[Tensor] | None,
) -> dict[str, float]:
    """The barriers of loss and accuracy, and the accuracy in the middle."""
    points = []
    for alpha in alphas:
        state = between(one, other, net, alpha)
        if batches is not None and 0 < alpha < 1:
            state = repaired(net, state, [one, other], [1 - alpha, alpha], batches)
        points.append(measured(net, state, test))
    excess = [[value - (1 - alpha) * first - alpha * last
               for alpha, value in zip(alphas, values, strict=True)]
              for values in zip(*points, strict=True) for first, last in [(values[0], values[-1])]]
    return {"loss": max(excess[0]), "accuracy": -min(excess[1]),
            "middle": points[len(points) // 2][1], "ends": (points[0][1] + points[-1][1]) / 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--train", type=int, default=10_000, help="images to train on")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--points", type=int, default=9, help="on the way, odd")
    parser.add_argument("--networks", default="", help="only those whose name has this in it")
    given = parser.parse_args()

    def tensors(data: ImageData) -> Data:
        images, labels = data.batch(range(len(data)))
        return (images.float() / 255 - 0.1307) / 0.3081, labels

    train = tensors(load_data("zoo/mnist", split="train").take(given.train))
    test = tensors(load_data("zoo/mnist", split="test").take(2_000))
    batches = train[0][:2_000].split(200)
    alphas = torch.linspace(0, 1, given.points).tolist()
    print("| network | units matched by | REPAIR | loss barrier | accuracy barrier | accuracy "
          "at ½ | of the ends |\n| --- | --- | --- | --- | --- | --- | --- |")
    for name, build in NETWORKS.items():
        if given.networks not in name:
            continue
        rows: dict[tuple[str, bool], list[dict[str, float]]] = {}
        for pair in range(given.pairs):
            nets = [trained(build, 2 * pair + seed, train, given.epochs) for seed in (0, 1)]
            one, other = ({key: tensor.detach() for key, tensor in net.state_dict().items()}
                          for net in nets)
            graph = trace(nets[0], train[0][:1])
            for way, state in ways(nets[0], one, other, graph, batches, pair).items():
                for fixed in (False, True):
                    rows.setdefault((way, fixed), []).append(path(
                        nets[0], one, state, test, alphas, batches if fixed else None))
        for (way, fixed), found in rows.items():
            cells = [spread([row["loss"] for row in found], 3),
                     *(spread([row[what] for row in found], 1)
                       for what in ("accuracy", "middle", "ends"))]
            print(f"| {name} | {way} | {'yes' if fixed else 'no'} | {' | '.join(cells)} |",
                  flush=True)


def spread(values: Sequence[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
