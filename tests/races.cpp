// All operations, replayed by several threads with the same results each time. For the thread sanitizer.
#include "../kernels/cpu.cpp"
#include <cstdio>
#include <cstdlib>

static std::vector<bf16> numbers(long count) {
    std::vector<bf16> made(count);
    for (auto &each : made) each = to_bf16((rand() % 2001 - 1000) * 1e-3f);
    return made;
}

int main() {
    const long rows = 3, dim = 64, n_head = 4, n_kv_head = 2, head_dim = 16, ffn = 512, vocab = 4000, positions = 600;
    const long channels = (n_head + 2 * n_kv_head) * head_dim;
    auto table = numbers(vocab * dim), norm = numbers(dim), wqkv = numbers(channels * dim), wo = numbers(dim * dim);
    auto w13 = numbers(2 * ffn * dim), w2 = numbers(dim * ffn), output = numbers(vocab * dim);
    auto cache = numbers(2 * n_kv_head * positions * head_dim);
    std::vector<int64_t> ids = {5, 6, 7}, input_pos = {500, 501, 502}, samples(rows);
    std::vector<float> rope(positions * head_dim, 0.7f);  // cosines, then sines, of each position
    int32_t seed = 7;
    const float temperature = 0.8f;
    std::vector<bf16> x(rows * dim), normed(rows * dim), qkv(rows * channels), attended(rows * dim);
    std::vector<bf16> h(rows * dim), wide(rows * 2 * ffn), gated(rows * ffn), down(rows * dim), logits(rows * vocab);

    const auto linear_layer = [&](const bf16 *from, long in, long out, const std::vector<bf16> &weight, bf16 *to,
                                  const bf16 *residual = nullptr) {
        return Linear{{{from, rows, in, out}, (const uint8_t *)weight.data(), nullptr, nullptr, 16, 0, residual, to}};
    };
    const Elementwise embedded = {{(const bf16 *)ids.data(), rows, 1, dim}, table.data(), 0, x.data()};
    const Elementwise first = {{x.data(), rows, dim, dim}, norm.data(), 1e-5, normed.data()};
    const Linear to_qkv = linear_layer(normed.data(), dim, channels, wqkv, qkv.data());
    const Attention attend = {{qkv.data(), rows, channels, dim}, rope.data(), input_pos.data(), n_kv_head,
                              positions, head_dim, cache.data(), cache.data() + cache.size() / 2, attended.data()};
    const Linear to_dim = linear_layer(attended.data(), dim, dim, wo, h.data(), x.data());
    const Linear to_ffn = linear_layer(h.data(), dim, 2 * ffn, w13, wide.data());
    const Elementwise gate = {{wide.data(), rows, 2 * ffn, ffn}, nullptr, 0, gated.data()};
    const Linear from_ffn = linear_layer(gated.data(), ffn, dim, w2, down.data());
    const Linear to_logits = linear_layer(down.data(), dim, vocab, output, logits.data());
    const Sampler sampler = {{logits.data(), rows, vocab, 1}, vocab, input_pos.data(), &seed, &temperature, 50,
                             0.9, 0.002, samples.data()};
    const Call calls[] = {{embedding, &embedded}, {rms_norm, &first}, {linear, &to_qkv}, {attention, &attend},
                          {linear, &to_dim}, {linear, &to_ffn}, {swiglu, &gate},
                          {linear, &from_ffn}, {linear, &to_logits}, {sample, &sampler}};
    replay(calls, std::size(calls), 4);
    const auto expected = logits;
    const auto ids_expected = samples;
    for (int i = 0; i < 300; i++) {
        std::fill(logits.begin(), logits.end(), 0);
        replay(calls, std::size(calls), i % 5 + 1);
        if (logits != expected || samples != ids_expected) return printf("another result in replay %d\n", i), 1;
    }
    puts("the same each time");
}
