// SPDX-License-Identifier: Apache-2.0
// The table of rules. One row makes a rule available to the launchers, to Python and to the tests.
#pragma once

#include "math/adabelief.h"
#include "math/adadelta.h"
#include "math/adagrad.h"
#include "math/adam.h"
#include "math/adamax.h"
#include "math/adan.h"
#include "math/ademamix.h"
#include "math/amsgrad.h"
#include "math/asgd.h"
#include "math/lion.h"
#include "math/nadam.h"
#include "math/radam.h"
#include "math/rmsprop.h"
#include "math/rprop.h"
#include "math/rule.h"
#include "math/sgd.h"

namespace torchopt::rules {

// Each name that Python uses equals a type. CMakeLists.txt compiles one file for each.
using adabelief = AdaBelief;
using adadelta = Adadelta;
using adagrad = Adagrad;
using adam = Adam;
using adamax = Adamax;
using adan = Adan;
using ademamix = AdEMAMix;
using amsgrad = AmsGrad;
using asgd = Asgd;
using lion = Lion;
using momentum = Momentum<false>;
using nadam = NAdam;
using nesterov = Momentum<true>;
using radam = RAdam;
using rmsprop = RmsProp<false>;
using rmsprop_centered = RmsProp<true>;
using rmsprop_centered_momentum = Then<RmsProp<true>, Momentum<false>>;
using rmsprop_momentum = Then<RmsProp<false>, Momentum<false>>;
using rprop = Rprop;
using sgd = Sgd;

}  // namespace torchopt::rules

// clang-format off
#define TORCHOPT_FOR_EACH_RULE(DO) \
    DO(adabelief) \
    DO(adadelta) \
    DO(adagrad) \
    DO(adam) \
    DO(adamax) \
    DO(adan) \
    DO(ademamix) \
    DO(amsgrad) \
    DO(asgd) \
    DO(lion) \
    DO(momentum) \
    DO(nadam) \
    DO(nesterov) \
    DO(radam) \
    DO(rmsprop) \
    DO(rmsprop_centered) \
    DO(rmsprop_centered_momentum) \
    DO(rmsprop_momentum) \
    DO(rprop) \
    DO(sgd)
// clang-format on
