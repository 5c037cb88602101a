"""Six updates at once, and three and three with a fresh wrapper between them: prints whether the bits are
equal."""
import copy

import torch

from launch.process import start

with start("cpu") as process:
    torch.manual_seed(0)
    gelu, linear = torch.nn.GELU, torch.nn.Linear
    whole = torch.nn.Sequential(linear(7, 33), gelu(), linear(33, 129), gelu(), linear(129, 5))
    resumed = copy.deepcopy(whole)
    for net, updates in ((whole, range(6)), (resumed, range(3)), (resumed, range(3, 6))):
        model, optimizer = process.wrap(net), torch.optim.SGD(net.parameters(), lr=0.1)
        for update in updates:
            x = torch.randn(3, 7, generator=torch.Generator().manual_seed(update * 100 + process.rank))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    print("same bits:", all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters())))
