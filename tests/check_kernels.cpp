// Products and attention against float64, and each row of many against that row alone, bit for bit. A program of its own,
// so that it can be compiled for another CPU and run in an emulator.
#include "../kernels/cpu.cpp"
#include <cstdio>
#include <random>

static std::mt19937 engine(0);
static std::normal_distribution<float> normal;

static std::vector<bf16> random_numbers(long count, float spread) {
    std::vector<bf16> made(count);
    for (auto &each : made) each = to_bf16(normal(engine) * spread);
    return made;
}

static void run(const Phase *phases, const void *operation) {
    const Call call = {phases, operation};
    execute(&call);
}

// Errors over the bound that rounding to bfloat16 allows, and rows that differ from that row alone.
static long check_linear(long in, long out, long bits, long groupsize) {
    const long groups = bits == 4 ? in / groupsize : 0;
    std::vector<uint8_t> bytes(out * in * bits / 8);
    for (auto &each : bytes) each = engine();
    const std::vector<bf16> floats = random_numbers(out * in, 0.02f), scales = random_numbers(out * groups + 1, 0.01f);
    const std::vector<bf16> minima = random_numbers(out * groups + 1, 0.02f), x = random_numbers(16 * in, 1);
    std::vector<float> row_scales(out, 0.001f);
    const uint8_t *data = bits == 16 ? (const uint8_t *)floats.data() : bytes.data();
    const void *scale = bits == 8 ? (const void *)row_scales.data() : scales.data();
    std::vector<bf16> y(16 * out), alone(out);
    const Weight weight = {{x.data(), 16, in, out}, data, scale, minima.data(), bits, groupsize, nullptr, y.data()};
    const Linear all = {weight};
    run(linear, &all);
    long failures = 0;
    for (long m = 0; m < 16; m++) {
        Linear one = all;
        one.x = x.data() + m * in;
        one.rows = 1;
        one.y = alone.data();
        run(linear, &one);
        failures += memcmp(alone.data(), y.data() + m * out, out * sizeof(bf16)) != 0;
        for (long n = 0; n < out; n++) {
            double exact = 0, terms = 0;
            for (long k = 0; k < in; k += 32) {
                float values[32];
                dequantize32(weight, n, k, values);
                for (long i = 0; i < 32; i++) {
                    const double product = double(values[i]) * to_float(x[m * in + k + i]);
                    exact += product;
                    terms += std::abs(product);
                }
            }
            const double error = std::abs(to_float(y[m * out + n]) - exact);
            failures += !(error <= terms * 0x1p-16 + std::abs(exact) * 0x1p-8 + 1e-30);
        }
    }
    return failures;
}

// The same for attention, with NaN after the last position.
static long check_attention(long n_head, long n_kv_head, long head_dim, long filled, long rows) {
    const long positions = 600, in = (n_head + 2 * n_kv_head) * head_dim, out = n_head * head_dim;
    std::vector<bf16> cache = random_numbers(2 * n_kv_head * positions * head_dim, 1), x = random_numbers(rows * in, 1);
    std::vector<bf16> y(rows * out), alone(out);
    std::vector<float> rope(positions * head_dim, 0);
    std::vector<int64_t> input_pos(rows);
    for (long m = 0; m < rows; m++) input_pos[m] = filled - rows + m;
    for (long p = 0; p < positions; p++) std::fill_n(&rope[p * head_dim], head_dim / 2, 1.0f);  // a rotation by 0
    for (long h = 0; h < 2 * n_kv_head; h++)
        for (long i = filled * head_dim; i < positions * head_dim; i++) cache[h * positions * head_dim + i] = 0x7FC0;
    bf16 *keys = cache.data(), *values = keys + n_kv_head * positions * head_dim;
    const Attention all = {{x.data(), rows, in, out}, rope.data(), input_pos.data(), n_kv_head, positions, head_dim,
                           keys, values, y.data()};
    run(attention, &all);
    long failures = 0;
    for (long m = 0; m < rows; m++) {
        Attention one = all;
        one.x = x.data() + m * in;
        one.rows = 1;
        one.input_pos = &input_pos[m];
        one.y = alone.data();
        run(attention, &one);
        failures += memcmp(alone.data(), y.data() + m * out, out * sizeof(bf16)) != 0;
        for (long head = 0; head < n_head; head++) {
            const long h = head / (n_head / n_kv_head);
            std::vector<double> weights, sums(head_dim);
            double total = 0;
            for (long p = 0; p <= input_pos[m]; p++) {
                double score = 0;
                for (long i = 0; i < head_dim; i++)
                    score += double(to_float(x[m * in + head * head_dim + i])) * to_float(keys[(h * positions + p) * head_dim + i]);
                weights.push_back(std::exp(score / std::sqrt(head_dim)));
                total += weights.back();
                for (long i = 0; i < head_dim; i++) sums[i] += weights.back() * to_float(values[(h * positions + p) * head_dim + i]);
            }
            for (long i = 0; i < head_dim; i++)
                failures += !(std::abs(to_float(y[m * out + head * head_dim + i]) - sums[i] / total) <= 0.02);
        }
    }
    return failures;
}

int main() {
    long failures = 0;
    for (long in : {32, 96, 256, 1376})
        for (long out : {1, 3, 37}) {
            failures += check_linear(in, out, 16, 0) + check_linear(in, out, 8, 0);
            for (long groupsize : {32, 64, 128, 256})
                if (in % groupsize == 0) failures += check_linear(in, out, 4, groupsize);
        }
    for (long head_dim : {20, 64, 80, 128})
        for (long ratio : {1, 2, 4, 8})
            for (long filled : {16, 257, 550}) failures += check_attention(2 * ratio, 2, head_dim, filled, 5);
    if (failures == 0) puts("all as they should be");
    return failures > 0;
}
