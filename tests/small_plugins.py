"""Small plugins that pass the conformance kit, one for each kind of thing."""

from __future__ import annotations

WEIGHTS = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="first", build="zoo_acme:first", kind="weights", summary="first",
                           idempotent=True)]

SEEN = []

def first(tensors, *, key):
    """The first one."""
    return tensors[0].clone()
'''
SLICE = WEIGHTS.replace("idempotent", 'scope="slice", idempotent')
MEASURED = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="unit", build="zoo_acme:unit", measure="zoo_acme:measure",
                           kind="weights", scope="slice", summary="unit")]

def measure(tensors, *, measured):
    return None if measured else tensors[0].square().sum()

def unit(tensors, *, measured):
    return tensors[0] / measured[0].sqrt()
'''
STATES = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="last", build="zoo_acme:last", kind="weights", summary="last",
                           scope="model")]

def last(states, *, weights):
    return states[-1]
'''
SCORED = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="best", build="zoo_acme:best", kind="weights", summary="best",
                           scope="model", uses={"score", "module", "data", "labels"},
                           can_use={"base"}, symmetric=True, idempotent=True)]

def best(states, *, base, score, module, data, labels):
    """The member that scores best and, of several, has the likeliest labels."""
    import torch

    def likelihood(state):
        return -sum(float(torch.nn.functional.cross_entropy(
            torch.func.functional_call(module, state, (batch,)), truth))
            for batch, truth in zip(data, labels))

    assert not module.training
    return max(states, key=lambda state: (score(state), likelihood(state)))
'''
FEATURES = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="sum", build="zoo_acme:Sum", kind="features", summary="sum")]

def Sum(dims, *, width: int = 4):
    """Linear maps to one size, added up.

    Options:
        width: of the sum
    """
    import torch

    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out_features = width
            self.maps = torch.nn.ModuleList([torch.nn.Linear(dim, width) for dim in dims])

        def forward(self, features):
            return sum(one(part) for one, part in zip(self.maps, features, strict=True))

    if width < 1:
        raise zoo.ZooError(f"width is {width}, expected 1 or more")
    return Sum()
'''
OUTPUTS = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="mean", build="zoo_acme:Mean", kind="outputs", summary="mean",
                           symmetric=True, idempotent=True)]

def Mean(members, num_classes, *, bend: float = 1.0):
    """The mean log-probability.

    Options:
        bend: nothing
    """
    import torch

    class Mean(torch.nn.Module):
        def forward(self, logits, features=None):
            return logits.mean(0).log_softmax(1)

    return Mean()
'''
FITTED = OUTPUTS.replace("        def forward", """        def fit(self, logits, labels):
            pass

        def forward""")
BACKBONE = '''
import zoo

@zoo.hookimpl
def zoo_backbones():
    return [zoo.BackboneSpec(name="net", build="zoo_acme:build", input_size=(3, 16, 16),
                             feature_dim=6)]

def build(*, num_classes, pretrained, in_chans=3):
    import torch
    from torch import nn
    from zoo.errors import WeightsError

    class Net(nn.Module):
        num_features = 6

        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(in_chans, 6, 3)
            self.reset_classifier(num_classes)

        def forward_features(self, x):
            return self.one(x)

        def forward_head(self, x, pre_logits=False):
            x = x.mean((2, 3))
            return x if pre_logits else self.fc(x)

        def forward(self, x):
            return self.forward_head(self.forward_features(x))

        def get_classifier(self):
            return self.fc

        def reset_classifier(self, num_classes):
            self.num_classes = num_classes
            self.fc = nn.Linear(6, num_classes)

    if pretrained:
        raise WeightsError("acme/net has no published weights")
    net = Net()
    net.preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [16, 16]}
    return net
'''
TRANSFER = '''
import zoo

@zoo.hookimpl
def zoo_transfers():
    return [zoo.TransferSpec(name="plain", build="zoo_acme:plain", summary="plain",
                             uses={"teachers"})]

def plain(model, *, criterion, teachers=(), strength: float = 1.0):
    """Train on the labels.

    Options:
        strength: of the loss
    """
    import torch
    from zoo.transfers.objective import Objective

    class Plain(Objective):
        def __init__(self):
            super().__init__(model, criterion)

        def loss(self, batch):
            return self.criterion(self.logits(batch), batch.labels)

    return Plain()
'''
DATA = '''
import zoo

@zoo.hookimpl
def zoo_datasets():
    return [zoo.DatasetSpec(name="dots", build="zoo_acme:dots", summary="dots")]

def dots(*, split):
    import torch

    class Dots(torch.utils.data.Dataset):
        classes = ["a", "b"]

        def __init__(self):
            seed = {"train": 0, "test": 1}[split]
            generator = torch.Generator().manual_seed(seed)
            self.images = torch.rand(8, 3, 8, 8, generator=generator)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index], index % 2

    return Dots()
'''
CATALOG = '''
import zoo

class Catalog:
    def find(self, name):
        known = {"one": "one", "two": "two"}
        return zoo.BackboneSpec(name=name, build="zoo_acme:net") if name in known else None

    def search(self, pattern):
        import fnmatch
        return fnmatch.filter(["one", "two"], pattern)

@zoo.hookimpl
def zoo_catalog():
    return Catalog()
'''
