// SPDX-License-Identifier: Apache-2.0
// The definition of a rule, and the code that every rule gets from it: the update of a whole optimizer, the step in
// place, and the exact derivatives of the update.
//
// A rule R turns a gradient into a direction. It is a type with
//   kStates               the number of state tensors, each with the shape of the gradient
//   kHypers               the number of hyper-parameters
//   kCoefficients         the number of coefficients for one tensor in one step
//   R::Coefficients<S>    the coefficients, a struct whose members all have type S
//   R::coefficients(h, k) from the hyper-parameters and the step k (counted from 1), for S = double or Dual<double, n>
//   R::apply(c, g, state, u, next)
//                         the rule on one element: direction u and next state from gradient g and state; for elements
//                         of type T or Dual<T, n>, and coefficients of type T or of the elements' type
// A rule with `kReadsParameter` true takes the parameter after g. A form that reads no parameter passes 0.
//
// An optimizer is a rule between stages that all optimizers share. With the gradient g and the parameter p:
//   g' = sign g + weight_decay p          sign is -1 if the optimizer maximizes
//   u, state' = R(g', state)
//   update = -lr (u + decoupled_weight_decay p)
#pragma once

#include <cstdint>
#include <type_traits>

#include "math/dual.h"
#include "math/host_device.h"

namespace torchopt {

/// The hyper-parameters of an optimizer start with these. Those of its rule follow.
enum ChainHyper { kLr, kWeightDecay, kDecoupledWeightDecay, kChainHypers };

/// kUpdate reads no parameter (both decays are 0); kDecayedUpdate reads it. kStep adds the update to the parameter if
/// the decays are 0, kDecayedStep does it otherwise. A decay of -0 adds nothing. A decay of 0 adds 0 p, which is NaN
/// for an infinite p.
enum class Form { kUpdate, kDecayedUpdate, kStep, kDecayedStep };

TORCHOPT_HOST_DEVICE constexpr bool is_decayed(Form form) {
    return form == Form::kDecayedUpdate || form == Form::kDecayedStep;
}
TORCHOPT_HOST_DEVICE constexpr bool is_step(Form form) {
    return form == Form::kStep || form == Form::kDecayedStep;
}

/// Whether `decay` is -0, which means no decay.
template <class S>
TORCHOPT_HOST_DEVICE bool is_none(const S& decay) {
    return value_of(decay) == 0 && 1 / value_of(decay) < 0;
}

/// x + p decay.
template <class S, class C>
TORCHOPT_HOST_DEVICE S add_decay(const S& x, const S& p, const C& decay) {
    return choose(is_none(decay), x, S(x + p * decay));
}

template <class S, class Rule>
struct ChainCoefficients {
    S lr, weight_decay, decoupled_weight_decay;
    typename Rule::template Coefficients<S> rule;
};

/// The sizes of an optimizer made from `Rule`.
template <class Rule>
struct Chain {
    static constexpr int kStates = Rule::kStates;
    static constexpr int kHypers = kChainHypers + Rule::kHypers;
    static constexpr int kCoefficients = kChainHypers + Rule::kCoefficients;
    static_assert(Rule::kCoefficients == 0 ||
                      sizeof(ChainCoefficients<double, Rule>) == kCoefficients * sizeof(double),
                  "the coefficients are a struct of nothing but numbers");
};

/// The coefficients as an array, which has the same layout.
template <class S, class Rule>
TORCHOPT_HOST_DEVICE S* as_array(ChainCoefficients<S, Rule>& c) {
    return reinterpret_cast<S*>(&c);
}

template <class Rule, class S>
TORCHOPT_HOST_DEVICE ChainCoefficients<S, Rule> chain_coefficients(
    const S (&h)[Chain<Rule>::kHypers], std::int64_t step) {
    return {h[kLr], h[kWeightDecay], h[kDecoupledWeightDecay],
            Rule::template coefficients<S>(h + kChainHypers, static_cast<double>(step))};
}

/// The data that a kernel needs besides tensors, in its compute type.
template <class T, class Rule>
struct Settings {
    T sign;
    ChainCoefficients<T, Rule> c;
};

/// Computed in double for every T: in float 1 - 0.999^k loses four digits.
template <class T, class Rule>
TORCHOPT_HOST_DEVICE Settings<T, Rule> settings(const double (&h)[Chain<Rule>::kHypers],
                                                bool maximize, std::int64_t step) {
    ChainCoefficients<double, Rule> exact = chain_coefficients<Rule, double>(h, step);
    Settings<T, Rule> out;
    out.sign = maximize ? T(-1) : T(1);
    for (int k = 0; k < Chain<Rule>::kCoefficients; ++k)
        as_array(out.c)[k] = static_cast<T>(as_array(exact)[k]);
    return out;
}

/// hyper_cotangent[h] += sum_k coefficient_cotangent[k] * d coefficient_k / d hyper_h, exact through dual numbers.
template <class Rule>
TORCHOPT_HOST_DEVICE void pull_back_coefficients(const double (&h)[Chain<Rule>::kHypers],
                                                 std::int64_t step,
                                                 const double* coefficient_cotangent,
                                                 double* hyper_cotangent) {
    constexpr int kHypers = Chain<Rule>::kHypers;
    using S = Dual<double, kHypers>;
    S seeded[kHypers];
    for (int j = 0; j < kHypers; ++j) seeded[j] = S::seed(h[j], j);
    ChainCoefficients<S, Rule> c = chain_coefficients<Rule, S>(seeded, step);
    for (int k = 0; k < Chain<Rule>::kCoefficients; ++k)
        for (int j = 0; j < kHypers; ++j)
            hyper_cotangent[j] += coefficient_cotangent[k] * as_array(c)[k].partial[j];
}

// Not a requires expression: nvcc compiles this as C++17.
template <class Rule, class = void>
inline constexpr bool reads_parameter = false;
template <class Rule>
inline constexpr bool reads_parameter<Rule, std::void_t<decltype(Rule::kReadsParameter)>> =
    Rule::kReadsParameter;

/// Computes one element. Inputs: g, the states, and p unless kUpdate. Outputs: the update (or p + update), the new
/// states.
template <class Rule, Form kForm, class T, class C, class S>
TORCHOPT_HOST_DEVICE void apply_chain(T sign, const ChainCoefficients<C, Rule>& c, const S* in,
                                      S* out) {
    constexpr int kStates = Rule::kStates;
    S g = in[0] * sign;
    if constexpr (is_decayed(kForm)) g = add_decay(g, in[1 + kStates], c.weight_decay);
    S u;
    if constexpr (!reads_parameter<Rule>) {
        Rule::apply(c.rule, g, in + 1, u, out + 1);
    } else if constexpr (kForm == Form::kUpdate) {
        Rule::apply(c.rule, g, zero<S>(), in + 1, u, out + 1);
    } else {
        Rule::apply(c.rule, g, in[1 + kStates], in + 1, u, out + 1);
    }
    if constexpr (is_decayed(kForm)) u = add_decay(u, in[1 + kStates], c.decoupled_weight_decay);
    const S update = u * (-c.lr);
    if constexpr (is_step(kForm)) {
        out[0] = in[1 + kStates] + update;
    } else {
        out[0] = update;
    }
}

/// The cotangent of a parameter that only the decays read, given those of the direction and of g'.
template <class T, class Rule>
TORCHOPT_HOST_DEVICE T pull_back_decay(const ChainCoefficients<T, Rule>& c, T u, T g) {
    return add_decay(add_decay(T(0), u, c.decoupled_weight_decay), g, c.weight_decay);
}

// A kernel reads kInputs tensors and writes kOutputs tensors element by element, and adds up kSums numbers over all
// elements. With kMayBeAbsent, cotangents that are zero and outputs that are not wanted may be absent.

/// The optimizer itself.
template <class R, Form kForm>
struct Forward {
    using Rule = R;
    static constexpr int kInputs = 1 + Rule::kStates + (kForm == Form::kUpdate ? 0 : 1);
    static constexpr int kOutputs = 1 + Rule::kStates;
    static constexpr int kSums = 0;
    static constexpr bool kMayBeAbsent = false;

    template <class T>
    TORCHOPT_HOST_DEVICE static void apply(const Settings<T, Rule>& s, const T* in, T* out) {
        apply_chain<Rule, kForm>(s.sign, s.c, in, out);
    }
};

/// The vector-Jacobian product of an update. Reads the inputs of `Forward` followed by one cotangent for each output,
/// and writes one cotangent for each input:
///   out[j] = sum_i cotangent[i] * d output_i / d input_j.
/// Exact: the Jacobian comes from running the code of the value with dual numbers.
template <class R, Form kForm>
struct DualVjp {
    using Rule = R;
    using Primal = Forward<R, kForm>;
    static constexpr int kInputs = Primal::kInputs + Primal::kOutputs;
    static constexpr int kOutputs = Primal::kInputs;
    static constexpr int kSums = 0;
    static constexpr bool kMayBeAbsent = true;

    template <class T>
    TORCHOPT_HOST_DEVICE static void apply(const Settings<T, Rule>& s, const T* in, T* out) {
        // The cotangent of an input that only the decays read follows from the other cotangents.
        constexpr bool kSplit = is_decayed(kForm) && !reads_parameter<Rule>;
        constexpr int kVariables = Primal::kInputs - (kSplit ? 1 : 0);
        using S = Dual<T, kVariables>;
        S x[Primal::kInputs];
        S y[Primal::kOutputs];
        for (int j = 0; j < kVariables; ++j) x[j] = S::seed(in[j], j);
        if constexpr (kSplit) x[kVariables] = S::constant(in[kVariables]);
        apply_chain<Rule, kForm>(s.sign, s.c, x, y);
        for (int j = 0; j < kVariables; ++j) {
            T sum = T(0);
            for (int i = 0; i < Primal::kOutputs; ++i)
                sum = sum + in[Primal::kInputs + i] * y[i].partial[j];
            out[j] = sum;
        }
        if constexpr (kSplit) {
            const T u = in[Primal::kInputs] * (-s.c.lr);
            out[kVariables] = pull_back_decay(s.c, u, T(out[0] * s.sign));
        }
    }
};

/// The same from a hand-written derivative of the rule, where that is faster. Such a rule defines
///   R::pull_back(c, g, state, u_cotangent, next_cotangents, g_cotangent, state_cotangents)
/// and csrc/tests/test_math.cpp compares it with `DualVjp`.
template <class R, Form kForm>
struct HandVjp {
    using Rule = R;
    using Primal = Forward<R, kForm>;
    static constexpr int kInputs = Primal::kInputs + Primal::kOutputs;
    static constexpr int kOutputs = Primal::kInputs;
    static constexpr int kSums = 0;
    static constexpr bool kMayBeAbsent = true;

    template <class T>
    TORCHOPT_HOST_DEVICE static void apply(const Settings<T, Rule>& s, const T* in, T* out) {
        constexpr int kParam = 1 + Rule::kStates;
        const auto& c = s.c;
        const T* const cotangents = in + Primal::kInputs;
        T g = in[0] * s.sign;
        if constexpr (is_decayed(kForm)) g = add_decay(g, in[kParam], c.weight_decay);
        const T u = cotangents[0] * (-c.lr);
        T pulled;
        Rule::pull_back(c.rule, g, in + 1, u, cotangents + 1, pulled, out + 1);
        out[0] = pulled * s.sign;
        if constexpr (is_decayed(kForm)) out[kParam] = pull_back_decay(c, u, pulled);
    }
};

template <class Rule, class = void>
inline constexpr bool kHasPullBack = false;
template <class Rule>
inline constexpr bool kHasPullBack<Rule, std::void_t<decltype(&Rule::template pull_back<float>)>> =
    true;

template <class R, Form kForm>
using Vjp = std::conditional_t<kHasPullBack<R>, HandVjp<R, kForm>, DualVjp<R, kForm>>;

/// `DualVjp` of the decayed update, extended by derivatives with respect to the coefficients. These are the sums, in
/// the order of `ChainCoefficients`.
template <class R>
struct HyperVjp {
    using Rule = R;
    using Primal = Forward<R, Form::kDecayedUpdate>;
    static constexpr int kInputs = Primal::kInputs + Primal::kOutputs;
    static constexpr int kOutputs = Primal::kInputs;
    static constexpr int kSums = Chain<R>::kCoefficients;
    static constexpr bool kMayBeAbsent = true;

    template <class T>
    TORCHOPT_HOST_DEVICE static void apply(const Settings<T, Rule>& s, const T* in, T* out) {
        constexpr int kVariables = Primal::kInputs + kSums;
        using S = Dual<T, kVariables>;
        S x[Primal::kInputs];
        S y[Primal::kOutputs];
        for (int j = 0; j < Primal::kInputs; ++j) x[j] = S::seed(in[j], j);
        Settings<T, Rule> plain = s;
        ChainCoefficients<S, Rule> c;
        for (int k = 0; k < kSums; ++k)
            as_array(c)[k] = S::seed(as_array(plain.c)[k], Primal::kInputs + k);
        apply_chain<Rule, Form::kDecayedUpdate>(s.sign, c, x, y);
        for (int j = 0; j < kVariables; ++j) {
            T sum = T(0);
            for (int i = 0; i < Primal::kOutputs; ++i)
                sum = sum + in[Primal::kInputs + i] * y[i].partial[j];
            out[j] = sum;
        }
    }
};

/// `Second` after `First`: the direction of `First` is the gradient of `Second`.
template <class First, class Second>
struct Then {
    static constexpr int kStates = First::kStates + Second::kStates;
    static constexpr int kHypers = First::kHypers + Second::kHypers;
    static constexpr int kCoefficients = First::kCoefficients + Second::kCoefficients;
    template <class S>
    struct Coefficients {
        typename First::template Coefficients<S> first;
        typename Second::template Coefficients<S> second;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double k) {
        return {First::template coefficients<S>(h, k),
                Second::template coefficients<S>(h + First::kHypers, k)};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        S between;
        First::apply(c.first, g, state, between, next);
        Second::apply(c.second, between, state + First::kStates, u, next + First::kStates);
    }
};

}  // namespace torchopt
