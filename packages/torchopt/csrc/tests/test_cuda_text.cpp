// SPDX-License-Identifier: Apache-2.0
// Compares the CUDA kernels, compiled for the host (emulated_cuda/), with the OpenMP kernels. Covers all rules, kinds
// and dtypes, sizes around a pack and a block, addresses not aligned to a pack, and more tensors than one launch takes.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "emulated_cuda/cuda_runtime.h"
#include "launch/cuda.h"
#include "launch/openmp.h"
#include "math/half.h"
#include "math/rules.h"

namespace torchopt {
#define TORCHOPT_DECLARE(NAME)                      \
    template <>                                     \
    void run_on_cpu<rules::NAME>(const CpuLaunch&); \
    template <>                                     \
    void run_on_cuda<rules::NAME>(const CudaLaunch&);
TORCHOPT_FOR_EACH_RULE(TORCHOPT_DECLARE)
}  // namespace torchopt

namespace {

using namespace torchopt;

/// One role. Its tensors are in separate memory, `offset` elements after an address aligned to a pack. The memory has
/// exactly that size, so the address sanitizer detects an access to the element after the last.
template <class Storage>
struct Role {
    std::vector<std::vector<Storage>> memory;
    std::size_t offset;

    std::vector<std::uintptr_t> addresses() {
        std::vector<std::uintptr_t> out;
        for (std::vector<Storage>& tensor : memory)
            out.push_back(reinterpret_cast<std::uintptr_t>(tensor.data() + offset));
        return out;
    }
};

template <class Storage>
Role<Storage> make_role(const std::vector<std::int64_t>& sizes, std::size_t offset, double phase) {
    Role<Storage> role{{}, offset};
    for (const std::int64_t size : sizes) {
        std::vector<Storage> tensor(static_cast<std::size_t>(size) + offset);
        for (std::size_t k = 0; k < tensor.size(); ++k)
            // Values in (0.1, 0.9): second moments are positive.
            store(static_cast<Compute<Storage>>(
                      0.5 + 0.4 * std::sin(phase + 0.37 * static_cast<double>(k))),
                  tensor[k]);
        role.memory.push_back(std::move(tensor));
    }
    return role;
}

template <class Storage>
bool same(const Storage& a, const Storage& b) {
    const auto x = load(a);
    const auto y = load(b);
    return std::memcmp(&a, &b, sizeof(Storage)) == 0 || (std::isnan(x) && std::isnan(y));
}

struct Sizes {
    int inputs, outputs, required;
};

template <class Rule>
Sizes sizes_of(Kind kind) {
    constexpr int kStates = Rule::kStates;
    constexpr int kOutputs = 1 + kStates;
    switch (kind) {
        case Kind::kUpdate: return {1 + kStates, kOutputs, 1 + kStates};
        case Kind::kDecayedUpdate:
        case Kind::kStep: return {2 + kStates, kOutputs, 2 + kStates};
        case Kind::kUpdateVjp: return {1 + kStates + kOutputs, 1 + kStates, 1 + kStates};
        case Kind::kDecayedUpdateVjp:
        case Kind::kHyperVjp: return {2 + kStates + kOutputs, 2 + kStates, 2 + kStates};
    }
    return {0, 0, 0};
}

template <class Rule, class Storage>
void check_case(const char* name, Kind kind, Dtype dtype, const std::vector<std::int64_t>& sizes,
                std::size_t offset, bool decays) {
    const Sizes roles = sizes_of<Rule>(kind);
    constexpr int kHypers = Chain<Rule>::kHypers;
    std::vector<double> hypers;
    for (int h = 0; h < kHypers; ++h) hypers.push_back(0.3 + 0.04 * h);
    if (!decays) hypers[kWeightDecay] = hypers[kDecoupledWeightDecay] = 0.0;
    std::vector<std::int64_t> steps;
    for (std::size_t i = 0; i < sizes.size(); ++i)
        steps.push_back(static_cast<std::int64_t>(i) + 2);
    std::int64_t blocks = 0;
    for (const std::int64_t size : sizes)
        blocks += (size + kCudaBlockElements - 1) / kCudaBlockElements;

    std::vector<Role<Storage>> results[2];
    std::vector<double> cotangents[2];
    for (const bool cuda : {false, true}) {
        Tensors tensors;
        tensors.dtype = dtype;
        tensors.sizes = sizes;
        tensors.step = 5;
        if (offset == 0)
            for (const std::int64_t& step : steps)
                tensors.steps.push_back(reinterpret_cast<std::uintptr_t>(&step));
        std::vector<Role<Storage>> inputs, outputs;
        for (int r = 0; r < roles.inputs; ++r)
            inputs.push_back(make_role<Storage>(sizes, offset, 0.1 + r));
        for (int r = 0; r < roles.outputs; ++r)
            outputs.push_back(make_role<Storage>(sizes, offset, 100.0 + r));
        for (Role<Storage>& role : inputs) tensors.inputs.push_back(role.addresses());
        if (kind ==
            Kind::kStep) {  // in place: the parameter is the last input and the first output
            tensors.outputs.push_back(tensors.inputs.back());
            for (int r = 1; r < roles.outputs; ++r)
                tensors.outputs.push_back(tensors.inputs[static_cast<std::size_t>(r)]);
        } else {
            for (Role<Storage>& role : outputs) tensors.outputs.push_back(role.addresses());
        }
        if (roles.required <
            roles.inputs) {  // the last cotangent is zero, the second is not wanted
            for (std::uintptr_t& address : tensors.inputs.back()) address = 0;
            if (roles.outputs > 1)
                for (std::uintptr_t& address : tensors.outputs[1]) address = 0;
        }
        cotangents[cuda].assign(static_cast<std::size_t>(kHypers), 0.0);
        if (cuda) {
            constexpr double kUnwritten = std::numeric_limits<double>::quiet_NaN();
            std::vector<double> partials(static_cast<std::size_t>(blocks * kHypers), kUnwritten);
            double* const rows = kind == Kind::kHyperVjp ? partials.data() : nullptr;
            run_on_cuda<Rule>({kind, tensors, hypers, true, 1, 0, rows});
            if (rows != nullptr)
                for (std::size_t k = 0; k < partials.size(); ++k)
                    cotangents[cuda][k % static_cast<std::size_t>(kHypers)] += partials[k];
        } else {
            run_on_cpu<Rule>({kind, tensors, hypers, true, 1, cotangents[cuda].data()});
        }
        results[cuda] = std::move(outputs);
        for (Role<Storage>& role : inputs) results[cuda].push_back(std::move(role));
    }
    for (std::size_t r = 0; r < results[0].size(); ++r)
        for (std::size_t i = 0; i < sizes.size(); ++i)
            for (std::size_t k = 0; k < results[0][r].memory[i].size(); ++k)
                if (!same(results[0][r].memory[i][k], results[1][r].memory[i][k])) {
                    std::fprintf(stderr,
                                 "%s, kind %d, dtype %d, offset %zu: role %zu, tensor %zu of %lld "
                                 "elements, element %zu: expected %g, got %g\n",
                                 name, static_cast<int>(kind), static_cast<int>(dtype), offset, r,
                                 i, static_cast<long long>(sizes[i]), k,
                                 static_cast<double>(load(results[0][r].memory[i][k])),
                                 static_cast<double>(load(results[1][r].memory[i][k])));
                    ++torchopt::test::failures;
                    return;
                }
    if (kind == Kind::kHyperVjp)
        for (std::size_t h = 0; h < cotangents[0].size(); ++h)
            // The same numbers in another order.
            if (!(std::isnan(cotangents[0][h]) && std::isnan(cotangents[1][h])))
                CHECK_NEAR(cotangents[1][h], cotangents[0][h], 1e-11);
}

template <class Rule, class Storage>
void check_dtype(const char* name, Dtype dtype) {
    constexpr std::int64_t kBlock = kCudaBlockElements;
    const std::vector<std::int64_t> around = {0, 1,          3,      4,          5,
                                              0, kBlock - 1, kBlock, kBlock + 1, 2 * kBlock + 3};
    const std::vector<std::int64_t> few = {3, 0, kBlock + 1};
    const std::vector<std::int64_t> many(130, 5);  // two and a half launches
    for (const Kind kind : {Kind::kUpdate, Kind::kDecayedUpdate, Kind::kStep, Kind::kUpdateVjp,
                            Kind::kDecayedUpdateVjp}) {
        check_case<Rule, Storage>(name, kind, dtype, around, 0, true);
        check_case<Rule, Storage>(name, kind, dtype, around, 1, false);
    }
    check_case<Rule, Storage>(name, Kind::kStep, dtype, many, 0, false);
    check_case<Rule, Storage>(name, Kind::kUpdate, dtype, {}, 0, false);
    check_case<Rule, Storage>(name, Kind::kHyperVjp, dtype, few, 0, true);
    check_case<Rule, Storage>(name, Kind::kHyperVjp, dtype, few, 1, true);
}

template <class Rule>
void check_rule(const char* name) {
    check_dtype<Rule, float>(name, Dtype::kFloat32);
    check_dtype<Rule, double>(name, Dtype::kFloat64);
    check_dtype<Rule, Float16>(name, Dtype::kFloat16);
    check_dtype<Rule, BFloat16>(name, Dtype::kBFloat16);
}

/// A launch takes as many tensors as fit and uses the given stream. Without tensors nothing is launched.
void check_launches() {
    emulated_cuda::launches.clear();
    check_case<Adam, float>("adam", Kind::kUpdate, Dtype::kFloat32, {0, 0}, 0, false);
    check_case<Adam, float>("adam", Kind::kUpdate, Dtype::kFloat32, {}, 0, false);
    CHECK_TRUE(emulated_cuda::launches.empty());
    check_case<Adam, float>("adam", Kind::kUpdate, Dtype::kFloat32, {1, 0, kCudaBlockElements + 1},
                            0, false);
    CHECK_TRUE(emulated_cuda::launches.size() == 1);
    CHECK_TRUE(emulated_cuda::launches[0].blocks == 3);
    // Two launches whose blocks write separate rows.
    emulated_cuda::launches.clear();
    const std::vector<std::int64_t> many(40, 1);
    check_case<Adam, float>("adam", Kind::kHyperVjp, Dtype::kFloat32, many, 0, true);
    CHECK_TRUE(emulated_cuda::launches.size() == 2);
}

/// Afterwards the thread has its previous context, and no other device has one.
void check_contexts() {
    for (void* const before :
         {static_cast<void*>(nullptr), static_cast<void*>(&emulated_cuda::devices[2])}) {
        emulated_cuda::current_context = before;
        emulated_cuda::used_devices.clear();
        check_case<Sgd, float>("sgd", Kind::kUpdate, Dtype::kFloat32, {3}, 0, false);
        CHECK_TRUE(emulated_cuda::current_context == before);
        CHECK_TRUE(emulated_cuda::used_devices == std::vector<int>{1});
    }
}

}  // namespace

int main() {
#define TORCHOPT_CHECK(NAME) check_rule<rules::NAME>(#NAME);
    TORCHOPT_FOR_EACH_RULE(TORCHOPT_CHECK)
    check_launches();
    check_contexts();
    if (torchopt::test::failures == 0) std::puts("ok");
    return torchopt::test::failures == 0 ? 0 : 1;
}
