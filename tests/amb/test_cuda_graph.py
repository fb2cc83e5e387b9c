"""train.py --cuda-graph: a replayed step is the step."""

import pytest
import torch

from amb.speed import CudaGraph

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_replays_equal_steps_as_they_are():
    """The same updates, dropout included, over more steps than the warm-up has; one batch of another size."""
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)).cuda()
        rate = torch.tensor(0.1, device="cuda")
        optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True, capturable=graphed)

        def step(x, factor, model=model, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss = model(x).square().mean() * factor
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = CudaGraph(step) if graphed else step
        losses = []
        for number in range(8):
            torch.manual_seed(number)
            rate.fill_(0.1 / (1 + number))
            x = torch.randn(3 if number == 6 else 5, 8, generator=torch.Generator().manual_seed(number)).cuda()
            losses.append(run(x, 2).item())
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    (losses, weights), (graphed_losses, graphed_weights) = results
    assert graphed_losses == pytest.approx(losses, rel=1e-5)
    for ours, expected in zip(graphed_weights, weights, strict=True):
        torch.testing.assert_close(ours, expected)
