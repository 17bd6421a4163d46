"""What a flush takes at most, worked out before it: never too little, and what there is room for takes no memory."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pool import LAYOUTS

from hfkv.paging.bounds import most_ahead
from hfkv.paging.pool import PagePool


@given(
    st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2, 5]), st.sampled_from([(16, 4), (32, 32), (64, 32)]),
    st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_no_flush_takes_more_than_was_said(layers, batch, heads, sizes, one_tier, seed):
    """Whatever enters, and however many tokens become low up to as many as enter; the worst case is reached."""
    (tokens, entering), generator = sizes, torch.Generator().manual_seed(seed)
    tiers = 1 if one_tier else 2
    before = torch.randint(0, 3 * tokens, (layers, batch, heads, tiers), generator=generator)
    ahead = most_ahead(before.view(-1, tiers), tokens, entering, layers, heads)
    pages = -(-before // tokens)

    def check(after, tight=()):
        new = -(-after // tokens)
        took = (new - pages).clamp_min(0).sum((1, 2))  # [layers, tiers]
        assert (took <= ahead[:, :tiers]).all()
        assert (new.sum(3).amax((1, 2)) <= ahead[:, -1]).all()
        for tier in tight:
            assert torch.equal(took[:, tier], ahead[:, tier])

    everything = before.clone()
    everything[..., 0] += entering
    check(everything, tight=[0])
    if one_tier:
        assert torch.equal((-(-everything // tokens))[..., 0].amax((1, 2)), ahead[:, -1])
        return
    for _ in range(5):  # so many of the entering go high, and no more than enter become low, in whatever heads
        high = torch.randint(0, entering + 1, (layers, batch, heads), generator=generator)
        low = torch.rand(layers, batch, heads, generator=generator).pow(4)
        low = (low / low.sum(2, keepdim=True) * (entering * heads)).long()
        low = torch.minimum(low, before[..., 0] + entering)  # they come from their own row
        after = torch.stack([before[..., 0] + high, before[..., 1] + low], 3)
        after[..., 0] = torch.minimum(after[..., 0], before.sum(3) + entering - after[..., 1])
        check(after)
    worst, left = before.clone(), torch.full((layers, batch), entering * heads)
    for _ in range(heads):  # open the page that is nearest to being full, again and again
        room = torch.where(worst[..., 1] == before[..., 1], -worst[..., 1] % tokens + 1, tokens * 9)
        cost, head = room.min(2)
        cost = torch.where(cost <= left, cost, 0)
        worst[..., 1].scatter_add_(2, head[..., None], cost[..., None])
        left -= cost
    worst[..., 0, 1] += left
    took = (-(-worst[..., 1] // tokens) - pages[..., 1]).sum((1, 2))
    assert (took <= ahead[:, 1]).all() and (ahead[:, 1] - took <= layers * batch).all()


@given(st.integers(1, 200), st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_what_a_pool_has_room_for_takes_no_more_memory(first, second, other):
    pool = PagePool("cpu")
    classes = [pool.class_of(layout) for layout in LAYOUTS[:2]]
    pool.reserve({classes[0]: first}, slack=0.5)
    pool.allocate(classes[0], torch.tensor([first // 2]))
    demand, size = dict(zip(classes, (second, other), strict=True)), pool.memory_bytes
    if pool.has_room(demand):
        pool.reserve(demand)
        assert pool.memory_bytes == size
    else:
        free = [pool._classes[cls].free for cls in classes]
        pool.reserve(demand)
        assert pool.memory_bytes > size or [pool._classes[cls].free for cls in classes] != free
