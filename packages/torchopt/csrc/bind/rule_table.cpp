// SPDX-License-Identifier: Apache-2.0
#include "bind/rule_table.h"

#include "bind/fork.h"

#include <numeric>
#include <optional>

#include "bind/tensors.h"
#include "launch/openmp.h"
#include "math/rules.h"
#if defined(TORCHOPT_WITH_CUDA)
#include "launch/cuda.h"
#endif

namespace torchopt {

#define TORCHOPT_DECLARE(NAME) \
    template <>                \
    void run_on_cpu<rules::NAME>(const CpuLaunch&);
TORCHOPT_FOR_EACH_RULE(TORCHOPT_DECLARE)
#if defined(TORCHOPT_WITH_CUDA)
#define TORCHOPT_DECLARE_CUDA(NAME) \
    template <>                     \
    void run_on_cuda<rules::NAME>(const CudaLaunch&);
TORCHOPT_FOR_EACH_RULE(TORCHOPT_DECLARE_CUDA)
#define TORCHOPT_ON_CUDA(NAME) &run_on_cuda<rules::NAME>
#else
#define TORCHOPT_ON_CUDA(NAME) nullptr
#endif

#define TORCHOPT_ENTRY(NAME)                                                                      \
    RuleEntry{#NAME, rules::NAME::kStates, Chain<rules::NAME>::kHypers, &run_on_cpu<rules::NAME>, \
              TORCHOPT_ON_CUDA(NAME)},

const std::vector<RuleEntry>& rule_table() {
    static const std::vector<RuleEntry> rules = {TORCHOPT_FOR_EACH_RULE(TORCHOPT_ENTRY)};
    return rules;
}

const RuleEntry& find_rule(const std::string& name) {
    for (const RuleEntry& entry : rule_table())
        if (name == entry.name) return entry;
    refuse("there is no rule named '" + name + "'");
}

Kind find_kind(int code) {
    if (code < 0 || code > static_cast<int>(Kind::kHyperVjp)) refuse("unknown kind");
    return static_cast<Kind>(code);
}

RoleCounts role_counts(const RuleEntry& rule, Kind kind) {
    const auto states = static_cast<std::size_t>(rule.states);
    const std::size_t outputs = 1 + states;
    switch (kind) {
        case Kind::kUpdate: return {1 + states, outputs, 1 + states};
        case Kind::kDecayedUpdate:
        case Kind::kStep: return {2 + states, outputs, 2 + states};
        case Kind::kUpdateVjp: return {1 + states + outputs, 1 + states, 1 + states};
        case Kind::kDecayedUpdateVjp:
        case Kind::kHyperVjp: return {2 + states + outputs, 2 + states, 2 + states};
    }
    refuse("unknown kind");
}

std::vector<double> launch(const RuleEntry& rule, Kind kind, const Tensors& tensors,
                           const std::vector<double>& hypers, bool maximize,
                           const Placement& placement) {
    if (hypers.size() != static_cast<std::size_t>(rule.hypers))
        refuse("wrong number of hyper-parameters: expected " + std::to_string(rule.hypers) +
               ", got " + std::to_string(hypers.size()));
    std::vector<double> cotangents(kind == Kind::kHyperVjp ? hypers.size() : 0, 0.0);
    if (placement.device == kCpu) {
        // A few elements are finished before another thread could acquire the lock.
        std::optional<py::gil_scoped_release> no_gil;
        int threads = 1;
        if (std::accumulate(tensors.sizes.begin(), tensors.sizes.end(), std::int64_t{0}) > kChunk) {
            no_gil.emplace();
            threads = forks::usable_threads(placement.num_threads);
        }
        rule.run_on_cpu({kind, tensors, hypers, maximize, threads, cotangents.data()});
        return cotangents;
    }
    if (rule.run_on_cuda == nullptr)
        throw std::runtime_error(
            "torchopt was built without CUDA kernels; rebuild it with TORCHOPT_CUDA=ON");
    const py::gil_scoped_release no_gil;
    rule.run_on_cuda({kind, tensors, hypers, maximize, placement.device, placement.stream,
                      reinterpret_cast<double*>(placement.partials)});
    return cotangents;
}

}  // namespace torchopt
