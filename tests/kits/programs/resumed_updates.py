"""Six updates at once, and three and three with a fresh wrapper between them: prints whether the bits are
equal."""
import torch

from launch.process import start


def make():
    torch.manual_seed(0)
    gelu, linear = torch.nn.GELU, torch.nn.Linear
    return torch.nn.Sequential(linear(7, 33), gelu(), linear(33, 129), gelu(), linear(129, 5))


def updates(process, net, first, last):
    model = process.wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for update in range(first, last):
        x = torch.randn(3, 7, generator=torch.Generator().manual_seed(update * 100 + process.rank))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


with start("cpu") as process:
    whole, resumed = make(), make()
    updates(process, whole, 0, 6)
    updates(process, resumed, 0, 3)
    updates(process, resumed, 3, 6)
    print("same bits:", all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters())))
