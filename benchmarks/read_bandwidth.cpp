// How fast all cores together read memory, in GB/s: the ceiling of decoding at batch size 1. Prints one figure a line.
//   g++ -O3 -march=native -fopenmp benchmarks/read_bandwidth.cpp -o read_bandwidth && ./read_bandwidth [rounds]
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

int main(int argc, char **argv) {
    const long words = 1l << 27;  // a GiB, more than any cache holds
    uint64_t *data = static_cast<uint64_t *>(aligned_alloc(64, words * sizeof(uint64_t)));  // not touched: each thread does
#pragma omp parallel for schedule(static)
    for (long i = 0; i < words; i++) data[i] = i;
    for (int round = 0; round < (argc > 1 ? atoi(argv[1]) : 5); round++) {
        const auto start = std::chrono::steady_clock::now();
        uint64_t sum = 0;
#pragma omp parallel for simd reduction(+ : sum) schedule(static)
        for (long i = 0; i < words; i++) sum += data[i];
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        printf("%.2f%s\n", words * sizeof(uint64_t) / seconds.count() / 1e9, sum == 1 ? " " : "");
    }
}
