"""The preallocated cache is a `DynamicCache`: fed with the same updates, both hold the same bits after every operation."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen3Config, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from llava15_fast.fast import kv_cache, limits
from llava15_fast.fast.guards import cache_guard
from llava15_fast.fast.kv_cache import KVPool, PooledLayer

LAYERS, HEADS, HEAD_DIM = 2, 2, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(limits, "KV_BLOCK", 8)
    monkeypatch.setattr(limits, "KV_HEADROOM", 2)


def states(batch, tokens):
    return torch.randn(batch, HEADS, tokens, HEAD_DIM)


def guard(cache):
    return cache_guard(cache, LAYERS, kv_cache.LAYERS)


def borrow(cache, batch, tokens=0, pool=None):
    pool = pool or KVPool()
    assert guard(cache) is None
    return pool.borrow(cache, LAYERS, torch.empty(batch, 0, HEADS, HEAD_DIM), tokens)


def pooled(batch):
    cache = DynamicCache()
    borrow(cache, batch)
    return cache


def update(caches, batch, tokens):
    """The same random keys and values for all caches, which return the same."""
    for layer in range(LAYERS):
        keys, values = states(batch, tokens), states(batch, tokens)
        first, *others = (cache.update(keys, values, layer) for cache in caches)
        for other in others:
            assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


def write_in_place(cache, batch, tokens, *others, pool=None):
    """As the kernels fill a cache; the other caches are updated with the same."""
    past = cache.get_seq_length()
    loan = borrow(cache, batch, past + tokens, pool)
    assert loan.is_whole and loan.length == past
    for index, sides in enumerate(loan.buffers.layers):
        pair = states(batch, tokens), states(batch, tokens)
        for side, new in zip(sides, pair, strict=True):
            side[:, past : past + tokens] = new.transpose(1, 2)
        for other in others:
            other.update(*pair, index)
    loan.advance(tokens)
    return loan


def buffers(cache):
    (found,) = {layer._loan.buffers for layer in cache.layers}
    return found


def assert_unchanged(kept, expected):
    for pair, wanted in zip(kept, expected, strict=True):
        assert torch.equal(pair[0], wanted[0]) and torch.equal(pair[1], wanted[1])


def assert_equal(ours, stock):
    assert ours.get_seq_length() == stock.get_seq_length()
    assert ours.get_mask_sizes(3, 0) == stock.get_mask_sizes(3, 0)
    assert not ours.is_compileable and ours.is_croppable and not any(ours.is_sliding)
    if stock.get_seq_length():
        for (keys, values, *rest), (their_keys, their_values, *their_rest) in zip(ours, stock, strict=True):
            assert torch.equal(keys, their_keys) and torch.equal(values, their_values) and rest == their_rest


operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["update", "write", "crop", "repeat"]), st.integers(1, 20)),
        st.tuples(st.sampled_from(["reorder", "select"]), st.lists(st.integers(0, 99), min_size=1, max_size=4)),
        st.tuples(st.sampled_from(["reset", "deepcopy", "pickle", "borrow", "read"]), st.none()),
    ),
    min_size=1,
    max_size=12,
)


@given(operations, st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_operations(operations, batch, seed):
    torch.manual_seed(seed)
    first_batch = batch
    ours, stock = pooled(batch), DynamicCache()
    kept, expected = [], []
    for name, number in operations:
        length = stock.get_seq_length()
        if name == "update":
            update([ours, stock], batch, number)
        elif name == "write":
            write_in_place(ours, batch, number, stock)
        elif name == "reset":
            if ours.layers and not all(isinstance(layer, PooledLayer) for layer in ours.layers):
                continue  # a copy's: transformers 5.17 zeroes instead
            ours.reset()
            stock, batch = DynamicCache(), first_batch
        elif name in ("deepcopy", "pickle"):
            before = ours
            ours = copy.deepcopy(ours) if name == "deepcopy" else pickle.loads(pickle.dumps(ours))
            write_in_place(before, batch, 3)  # goes its own way from now on
        elif name == "borrow":
            borrow(ours, batch, length)
        elif not length:
            continue
        elif name == "read":
            kept += [pair[:2] for pair in ours]
            expected = copy.deepcopy(kept)
        elif name == "crop":
            for cache in (ours, stock):
                cache.crop(-min(number, length - 1))
        elif name == "repeat":
            if batch * (repeats := 1 + number % 2) <= 6:
                batch *= repeats
                for cache in (ours, stock):
                    cache.batch_repeat_interleave(repeats)
        elif name == "reorder":
            chosen = torch.tensor([number[row % len(number)] % batch for row in range(batch)])
            for cache in (ours, stock):
                cache.reorder_cache(chosen)
        elif name == "select":
            chosen = torch.tensor([row % batch for row in number])
            batch = len(chosen)
            for cache in (ours, stock):
                cache.batch_select_indices(chosen)
        assert_equal(copy.deepcopy(ours), stock)  # a look at a copy is none that the cache has to respect
        assert_unchanged(kept, expected)
    assert_equal(ours, stock)


def addresses(cache):
    return [side.data_ptr() for pair in buffers(cache).layers for side in pair]


def test_tokens_do_not_move_the_buffers_until_they_are_full():
    cache, stock = pooled(2), DynamicCache()
    write_in_place(cache, 2, 3, stock)
    moves, before = [], addresses(cache)
    for length in range(4, 41):
        write_in_place(cache, 2, 1, stock)
        if (now := addresses(cache)) != before:
            moves.append(length)
        before = now
        assert_equal(copy.deepcopy(cache), stock)  # who reads keys keeps them as they are
    assert moves == [9, 17, 25, 33]  # each block holds 8, and growing leaves room for 2 more at least


def test_prompt_capacity_is_reserved_at_once():
    shape = 1, 16, HEADS, HEAD_DIM  # 8 would be full in a moment
    assert write_in_place(DynamicCache(), 1, 7).buffers.layers[0][0].shape == shape
    cache = DynamicCache()
    assert write_in_place(cache, 1, 21).buffers.capacity == 24
    loan = write_in_place(cache, 1, 23)  # and so does a long second turn
    assert {side.shape for pair in loan.buffers.layers for side in pair} == {(1, 48, HEADS, HEAD_DIM)}


def test_update_keeps_own_tensors_until_next_borrow():
    cache, stock = DynamicCache(), DynamicCache()
    loan = write_in_place(cache, 2, 3, stock)
    update([cache, stock], 2, 2)
    assert not loan.is_whole and [layer._loan for layer in cache.layers] == [None] * LAYERS
    assert write_in_place(cache, 2, 1, stock) is not loan
    assert_equal(cache, stock)


def test_crop_keeps_buffers_and_later_tokens_overwrite():
    cache, stock = pooled(2), DynamicCache()
    write_in_place(cache, 2, 4, stock)
    before = addresses(cache)
    for tokens in (3, 1, 0):
        for one in (cache, stock):
            one.crop(-tokens)
        write_in_place(cache, 2, tokens + 1, stock)
        assert_equal(copy.deepcopy(cache), stock)  # who reads keys keeps them as they are
    assert addresses(cache) == before


def update_too(cache, batch, tokens, *others):
    update([cache, *others], batch, tokens)


both_ways = pytest.mark.parametrize("follow", [write_in_place, update_too], ids=["write", "update"])


@both_ways
def test_cropping_everything(follow):
    cache, stock = pooled(2), DynamicCache()
    write_in_place(cache, 2, 5, stock)
    for one in (cache, stock):
        one.crop(-5)
    assert cache.get_seq_length() == stock.get_seq_length() == 0
    follow(cache, 2, 2, stock)
    assert_equal(cache, stock)


@pytest.mark.parametrize("length", [2, 5, 6, 9])
def test_cropping_to_a_length(length):
    """With a positive number: some versions of transformers take it, the others say what is wrong with it."""

    def crop(cache):
        try:
            return cache.crop(length)
        except ValueError as error:
            return str(error)

    cache, stock = pooled(1), DynamicCache()
    write_in_place(cache, 1, 6, stock)
    assert crop(cache) == crop(stock)
    assert_equal(cache, stock)


def test_beams_stay_in_their_buffers():
    cache, stock = pooled(3), DynamicCache()
    write_in_place(cache, 3, 5, stock)
    before = addresses(cache)
    for order in ([2, 2, 0], [1, 0, 2], [0, 0, 0]):
        for one in (cache, stock):
            one.reorder_cache(torch.tensor(order))
        write_in_place(cache, 3, 1, stock)
        assert_equal(copy.deepcopy(cache), stock)  # who reads keys keeps them as they are
    assert addresses(cache) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.reset(),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    ],
    ids=["crop", "reorder", "reset", "select"],
)
@pytest.mark.parametrize("cropped", [False, True], ids=["whole", "cropped"])
@both_ways
def test_handed_out_views_never_change(change, cropped, follow):
    """Keys and values that someone keeps are theirs, as with transformers' own cache."""
    cache = pooled(2)
    write_in_place(cache, 2, 5 + cropped)
    cache.crop(-int(cropped))
    kept = [pair[:2] for pair in cache]
    expected = copy.deepcopy(kept)
    borrow(cache, 2, 5)
    change(cache)
    follow(cache, 2, 4)
    assert_unchanged(kept, expected)


@both_ways
def test_reset_then_other_prompts(follow):
    cache = pooled(2)
    write_in_place(cache, 2, 5)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(3, 0) == (3, 0) and not cache.is_initialized
    stock = DynamicCache()
    follow(cache, 3, 4, stock)
    assert_equal(cache, stock)


@both_ways
def test_empty_cache_accepts_another_batch(follow):
    cache, stock = pooled(2), DynamicCache()
    follow(cache, 3, 4, stock)
    assert_equal(cache, stock)


@both_ways
def test_early_initialization(follow):
    cache, stock = pooled(2), DynamicCache(config=config())
    for one in (cache, stock):
        one.early_initialization(2, HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
        assert one.get_seq_length() == 0 and one.is_initialized
    follow(cache, 2, 3, stock)
    assert_equal(cache, stock)


@pytest.mark.parametrize("again", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_copies_are_dynamic_layers(again):
    cache, stock = DynamicCache(), DynamicCache()
    loan = write_in_place(cache, 2, 5, stock)
    copied = again(cache)
    copied = pickle.loads(copied) if isinstance(copied, bytes) else copied
    assert [type(layer) for layer in copied.layers] == [DynamicLayer] * LAYERS
    assert not loan.buffers.exposed
    write_in_place(cache, 2, 1)
    assert_equal(copied, stock)


def test_wrong_batch_size_raises_and_writes_nothing():
    cache, stock = pooled(2), DynamicCache()
    write_in_place(cache, 2, 5, stock)
    with pytest.raises(ValueError, match="holds 2 prompts, but the input has 3"):
        borrow(cache, 3, 6)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        cache.update(states(3, 2), states(3, 2), 0)
    assert [layer.get_seq_length() for layer in cache.layers] == [5] * LAYERS
    assert_equal(cache, stock)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    cache = DynamicCache()
    keys, values = states(1, 9).to(dtype), states(1, 9).to(dtype)
    loan = KVPool().borrow(cache, LAYERS, keys.transpose(1, 2)[:, :0], 0)
    assert {side.dtype for pair in loan.buffers.layers for side in pair} == {dtype}
    found = cache.update(keys, values, 0)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values) and found[0].dtype == dtype


@pytest.mark.parametrize("cropped", [False, True], ids=["whole", "cropped"])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_buffers_are_reclaimed_with_their_cache(read, captured, cropped):
    """With a graph of the decode step they go to the next cache, but not while someone may still look at them."""
    pool, cache = KVPool(), DynamicCache()
    held = write_in_place(cache, 2, 5, pool=pool).buffers
    held.slot.graph = object() if captured else None
    cache.crop(-int(cropped))
    kept = [pair[:2] for pair in cache] if read else []
    expected = copy.deepcopy(kept)
    assert not pool.idle
    del cache
    gc.collect()
    assert pool.idle == ([held] if captured and not read else [])
    following, stock = DynamicCache(), DynamicCache()
    assert (write_in_place(following, 2, 3, stock, pool=pool).buffers is held) is (captured and not read)
    assert_equal(following, stock)
    assert_unchanged(kept, expected)
    assert not pool.clear()


def test_idle_buffers_are_reused_and_bounded():
    pool = KVPool()
    for batch in (1, 2, 3):
        loan = write_in_place(DynamicCache(), batch, 5, pool=pool)
        loan.buffers.slot.graph = object()
    del loan
    gc.collect()
    assert [idle.batch for idle in pool.idle] == [1, 2, 3][-limits.IDLE_BUFFERS :]
    first = borrow(DynamicCache(), 2, 30, pool)  # too many tokens
    assert first.buffers.batch == 2 and len(pool.idle) == limits.IDLE_BUFFERS
    cache = DynamicCache()
    assert borrow(cache, 2, 3, pool).buffers.slot.graph is not None
    assert not any(side.any() for pair in buffers(cache).layers for side in pair)
    assert pool.clear() and not pool.idle and not pool.clear()


# Which caches are lent to


def config(**changes):
    sizes = {"num_hidden_layers": LAYERS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "hidden_size": 16}
    return Qwen3Config(**sizes, **changes)


@pytest.mark.parametrize("filled", [0, 5, 30])
@pytest.mark.parametrize("make", [DynamicCache, lambda: DynamicCache(config=config())], ids=["lazy", "config"])
def test_borrow_keeps_contents(make, filled):
    cache = make()
    if filled:
        update([cache], 2, filled)
    stock, layers = copy.deepcopy(cache), list(cache.layers)
    borrow(cache, 2, filled)
    assert type(cache) is DynamicCache and [type(layer) for layer in cache.layers] == [PooledLayer] * LAYERS
    assert all(now is then for now, then in zip(cache.layers, layers, strict=False))
    assert_equal(copy.deepcopy(cache), stock)
    write_in_place(cache, 2, 7, stock)
    assert_equal(cache, stock)
    update([cache, stock], 2, 7)
    assert_equal(cache, stock)


def test_borrow_does_not_alias_user_memory():
    keys, values = states(1, 4), states(1, 4)
    cache = DynamicCache([(keys, values)] * LAYERS)
    borrow(cache, 1, 4)
    before = keys.clone(), values.clone()
    cache.reorder_cache(torch.tensor([0]))
    for pair in buffers(cache).layers:
        for side in pair:
            side.zero_()
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


def test_borrow_is_idempotent():
    cache = DynamicCache()
    loan = write_in_place(cache, 1, 3)
    layers, before = list(cache.layers), addresses(cache)
    assert borrow(cache, 1, 3) is loan and loan.is_whole
    assert all(now is then for now, then in zip(cache.layers, layers, strict=True)) and addresses(cache) == before


def test_layers_of_different_lengths_fall_back():
    cache = pooled(1)
    write_in_place(cache, 1, 3)
    cache.layers[1].crop(-1)
    assert "different numbers of tokens" in guard(cache)


class OwnCache(DynamicCache):
    pass


class OwnLayer(DynamicLayer):
    pass


REFUSED = {
    "static": lambda: StaticCache(config=config(), max_cache_len=8),
    "sliding window": lambda: DynamicCache(config=config(use_sliding_window=True, sliding_window=4, max_window_layers=0)),
    "a method of its own": lambda: with_update(DynamicCache()),
    "one sliding layer": lambda: Cache(layers=[DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)]),
    "of its own class": OwnCache,
    "layers of their own class": lambda: with_layers([OwnLayer() for _ in range(LAYERS)]),
    "layers of their own class, made later": lambda: with_layers([], OwnLayer),
    "of a deeper model": lambda: with_layers([DynamicLayer() for _ in range(LAYERS + 1)]),
    "offloaded": lambda: offloaded(DynamicCache()),
    "not a dynamic cache": lambda: Cache(layer_class_to_replicate=DynamicLayer),
}


def with_layers(layers, later=None):
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, later
    return cache


def with_update(cache):
    cache.update = lambda keys, values, layer, *args: (keys, values)
    return cache


def offloaded(cache):
    cache.offloading = True  # its constructor makes a stream, which needs a GPU
    return cache


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_caches_fall_back_untouched(make):
    cache = make()
    layers, attributes = list(cache.layers), dict(cache.__dict__)
    assert guard(cache) is not None
    assert list(cache.layers) == layers and {**cache.__dict__, "layers": attributes["layers"]} == attributes


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
@both_ways
def test_cache_from_inference_mode_is_writable(read, follow):
    """Beams of a cache that someone has looked at are put in order in tensors of their own."""
    ours, stock = DynamicCache(), DynamicCache()
    with torch.inference_mode():
        write_in_place(ours, 2, 3, stock)
        assert not read or ours.layers[0].keys is not None
        for cache in (ours, stock):
            cache.reorder_cache(torch.tensor([1, 0]))
    follow(ours, 2, 2, stock)
    assert_equal(ours, stock)
