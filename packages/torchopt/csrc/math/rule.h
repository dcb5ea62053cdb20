// SPDX-License-Identifier: Apache-2.0
// What a rule is, and the vector-Jacobian product that every rule gets for free.
//
// A rule R is a type with
//   kInputs, kOutputs           how many tensors it reads and writes, element by element
//   R::Hyper                    the hyper-parameters, as doubles
//   R::Coefficients<T>          what one tensor needs in one step, in the compute type
//   R::coefficients<T>(h, k)    from the hyper-parameters and the step k (counted from 1)
//   R::apply(c, in, out)        the rule on one element, for T or Dual<T, kInputs>
#pragma once

#include <cstdint>

#include "math/dual.h"
#include "math/host_device.h"

namespace torchopt {

/// The vector-Jacobian product of a rule, itself a rule.
/// Reads the inputs of `Rule` followed by one cotangent for each output, writes one cotangent for each input:
///   out[j] = sum_i cotangent[i] * d output_i / d input_j.
/// Exact: the Jacobian comes from dual numbers run through the same text as the value.
template <class Rule>
struct Vjp {
    static constexpr int kInputs = Rule::kInputs + Rule::kOutputs;
    static constexpr int kOutputs = Rule::kInputs;
    using Hyper = typename Rule::Hyper;
    template <class T>
    using Coefficients = typename Rule::template Coefficients<T>;

    template <class T>
    TORCHOPT_HOST_DEVICE static Coefficients<T> coefficients(const Hyper& hyper,
                                                             std::int64_t step) {
        return Rule::template coefficients<T>(hyper, step);
    }

    template <class T>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<T>& c, const T (&in)[kInputs],
                                           T (&out)[kOutputs]) {
        Dual<T, Rule::kInputs> x[Rule::kInputs];
        Dual<T, Rule::kInputs> y[Rule::kOutputs];
        for (int j = 0; j < Rule::kInputs; ++j) x[j] = Dual<T, Rule::kInputs>::seed(in[j], j);
        Rule::apply(c, x, y);
        for (int j = 0; j < Rule::kInputs; ++j) {
            T sum = T(0);
            for (int i = 0; i < Rule::kOutputs; ++i)
                sum = sum + in[Rule::kInputs + i] * y[i].partial[j];
            out[j] = sum;
        }
    }
};

}  // namespace torchopt
