// CPU kernels with every instruction set of this processor: the consistency loss against its
// formula in double, the evidential loss against the first set, and no write outside an array.
#include <cmath>
#include <cstdlib>
#include <vector>

#include "consistency_cpu.h"
#include "evidential_cpu.h"
#include "expect.h"
#include "instruction_set.h"

namespace {

constexpr float kCanary = 12345.0f;
constexpr const char* kSets[] = {"avx512", "avx2", "sse2", "neon", "generic"};

float random_number() {
    return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f;
}

std::vector<float> random_numbers(int64_t count) {
    std::vector<float> numbers(count);
    for (float& x : numbers) x = random_number();
    return numbers;
}

// An array between two guard numbers.
class Guarded {
  public:
    explicit Guarded(int64_t count) : numbers_(count + 2, kCanary) {}
    float* get() { return numbers_.data() + 1; }
    void expect_intact() const {
        expect("nothing is written outside",
               numbers_.front() == kCanary && numbers_.back() == kCanary);
    }

  private:
    std::vector<float> numbers_;
};

struct Shape {
    int64_t queries, keys, queue;
    int dim;
    float alpha;
};

// Scores of one row against all keys, as probabilities; returns the log of their sum.
double softmax(const float* row, const std::vector<float>& keys, const std::vector<float>& queue,
               int dim, double temperature, std::vector<double>& p) {
    const int64_t count = static_cast<int64_t>(keys.size() + queue.size()) / dim;
    p.assign(count, 0.0);
    double top = -1e300, sum = 0.0;
    for (int64_t j = 0; j < count; ++j) {
        const int64_t split = static_cast<int64_t>(keys.size()) / dim;
        const float* key = j < split ? &keys[j * dim] : &queue[(j - split) * dim];
        for (int d = 0; d < dim; ++d) p[j] += double{row[d]} * key[d] / temperature;
        top = std::fmax(top, p[j]);
    }
    for (double& x : p) sum += x = std::exp(x - top);
    for (double& x : p) x /= sum;
    return top + std::log(sum);
}

void check_consistency(const Shape& shape) {
    const std::vector<float> query = random_numbers(shape.queries * shape.dim);
    const std::vector<float> teacher = random_numbers(shape.queries * shape.dim);
    const std::vector<float> keys = random_numbers(shape.keys * shape.dim);
    const std::vector<float> queue = random_numbers(shape.queue * shape.dim);
    Guarded losses(shape.queries), gradient(shape.queries * shape.dim), slope(shape.queries);
    std::vector<uint8_t> counted(shape.queries);
    mics::ConsistencyPair pair{};
    pair.query = query.data();
    pair.teacher = teacher.data();
    pair.source.keys = keys.data();
    pair.source.queue = queue.data();
    pair.source.queue_length = shape.queue;
    pair.losses = losses.get();
    pair.counted = counted.data();
    pair.gradient = gradient.get();
    pair.temperature = slope.get();
    mics::ConsistencyCall call{};
    call.pairs = &pair;
    call.pair_count = 1;
    call.queries = shape.queries;
    call.keys = shape.keys;
    call.dim = shape.dim;
    call.temperature = 0.5f;
    call.alpha = shape.alpha;
    for (const bool want_gradient : {true, false}) {
        call.want_gradient = want_gradient;
        mics::consistency_cpu(call, 2);
        std::vector<double> p, t;
        for (int64_t i = 0; i < shape.queries; ++i) {
            const double log_sum = softmax(&query[i * shape.dim], keys, queue, shape.dim, 0.5, p);
            softmax(&teacher[i * shape.dim], keys, queue, shape.dim, 0.5, t);
            double loss = log_sum;
            std::vector<double> outer(shape.dim);
            for (size_t j = 0; j < p.size(); ++j) {
                const bool own = static_cast<int64_t>(j) == i;
                const double target = shape.alpha * t[j] + (own ? 1.0 - shape.alpha : 0.0);
                const int64_t at = static_cast<int64_t>(j) * shape.dim;
                const float* key =
                    at < static_cast<int64_t>(keys.size()) ? &keys[at] : &queue[at - keys.size()];
                for (int d = 0; d < shape.dim; ++d) {
                    loss -= target * query[i * shape.dim + d] * key[d] / 0.5;
                    outer[d] += (p[j] - target) * key[d] / 0.5;
                }
            }
            expect_near("loss", static_cast<double>(i), losses.get()[i], loss, 5e-6);
            if (!want_gradient) continue;
            double by_temperature = 0.0;
            for (int d = 0; d < shape.dim; ++d) {
                expect_near("gradient", d, gradient.get()[i * shape.dim + d], outer[d], 2e-6);
                by_temperature -= query[i * shape.dim + d] * outer[d] / 0.5;
            }
            expect_near("gradient in T", static_cast<double>(i), slope.get()[i], by_temperature,
                        1e-5);
        }
    }
    for (const Guarded* array : {&losses, &gradient, &slope}) array->expect_intact();
}

struct EvidentialResult {
    std::vector<float> losses, fused, gradient;
};

EvidentialResult solve_evidential(int rows, int views, int classes) {
    std::srand(1);
    const std::vector<float> logits = random_numbers(int64_t{rows} * views * classes);
    std::vector<int64_t> labels(rows);
    for (int i = 0; i < rows; ++i) labels[i] = i % classes;
    Guarded losses(rows), fused(int64_t{rows} * classes), gradient(logits.size());
    mics::EvidentialCall call{};
    call.input = logits.data();
    call.labels = labels.data();
    call.losses = losses.get();
    call.fused = fused.get();
    call.gradient = gradient.get();
    call.rows = rows;
    call.ignore_index = -100;
    call.views = views;
    call.classes = classes;
    call.kl_weight = 0.5f;
    call.activation = mics::Activation::softplus;
    call.fuse = true;
    mics::evidential_cpu(call, 2);
    for (const Guarded* array : {&losses, &fused, &gradient}) array->expect_intact();
    const auto copy = [](Guarded& from, int64_t count) {
        return std::vector<float>(from.get(), from.get() + count);
    };
    return {copy(losses, rows), copy(fused, int64_t{rows} * classes),
            copy(gradient, logits.size())};
}

void expect_equal(const char* what, const std::vector<float>& got,
                  const std::vector<float>& wanted) {
    for (size_t i = 0; i < got.size(); ++i) {
        expect_near(what, static_cast<double>(i), got[i], wanted[i],
                    4e-6 + 2e-6 * std::fabs(wanted[i]));
    }
}

void check_evidential(int rows, int views, int classes) {
    const EvidentialResult here = solve_evidential(rows, views, classes);
    const char* const name = mics::instruction_set().name;
    expect("the baseline is always there", mics::use_instruction_set("sse2") ||
                                               mics::use_instruction_set("neon") ||
                                               mics::use_instruction_set("generic"));
    const EvidentialResult base = solve_evidential(rows, views, classes);
    mics::use_instruction_set(name);
    expect_equal("losses", here.losses, base.losses);
    expect_equal("fused evidence", here.fused, base.fused);
    expect_equal("gradient", here.gradient, base.gradient);
}

}  // namespace

int main() {
    for (const char* name : kSets) {
        if (!mics::use_instruction_set(name)) continue;
        std::srand(0);
        for (const float alpha : {0.0f, 0.4f}) {
            for (const Shape& shape :
                 {Shape{1, 1, 0, 32, alpha}, Shape{3, 5, 700, 40, alpha},
                  Shape{19, 19, 5000, 64, alpha}, Shape{70, 80, 30, 104, alpha}}) {
                check_consistency(shape);
            }
        }
        for (int rows : {1, 15, 16, 37}) {
            for (int classes : {2, 3, 8, 23, 131}) {
                for (int views : {1, 3, 8}) check_evidential(rows, views, classes);
            }
        }
    }
    return failures != 0;
}
