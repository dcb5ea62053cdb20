# SPDX-License-Identifier: Apache-2.0
"""Each sentence of the manuals that promises something without exception has a test.

`PROMISES` names the test, by a part of the sentence. A sentence that no test supports is weakened
or removed. `tools/promises.py` says which sentences count.
"""

from __future__ import annotations

import pytest

import promises
from public_names import ROOT

# The files of tests, from the folder `packages`, of the words before the slash below.
FOLDERS = {
    "optree": "packages/optree/tests",
    "torchopt": "packages/torchopt/tests",
    "tools": "tools/tests",
}

EXACT = (
    "torchopt/diff/explicit/test_exactness.py::"
    "test_every_optimizer_and_each_of_its_hyper_parameters"
)
UNROLLED = (
    "torchopt/diff/explicit/test_exactness.py::test_a_run_has_the_gradient_of_the_unrolled_loop"
)
REVERSED = (
    "torchopt/diff/explicit/test_reversible.py::test_ten_thousand_steps_are_undone_bit_for_bit"
)
FIRST = "torchopt/transform/test_derivatives.py::test_gradcheck"
SECOND = "torchopt/transform/test_derivatives.py::test_gradgradcheck"
WRAPPED = (
    "torchopt/transform/test_derivatives_of_wrappers.py::test_derivatives_of_wrapped_optimizers"
)
REPORTS = (
    "torchopt/diff/implicit/test_certificate.py::test_report_of_a_backward_pass_and_of_transforms"
)
WORLDS = "torchopt/distributed/test_task_parallel.py::test_every_engine_at_every_world_size"
BACKENDS = (
    "torchopt/distributed/test_world.py::test_one_program_gives_the_same_gradients_on_every_backend"
)
RESULTS = (
    "torchopt/distributed/test_nothing_silent.py::"
    "test_results_of_every_kind_are_alike_in_every_world"
)
COMPILED = "torchopt/test_second_order.py::test_values_and_gradients_of_everything_returned"
PROGRAMS = (
    "torchopt/solvers/test_quadratic_program.py::test_derivatives_of_solution_and_multipliers"
)
LEAVES = "optree/test_flatten.py::test_subclasses_of_builtins_are_leaves"
REGISTERED = "optree/test_registry.py::test_subclasses_are_not_registered"

PROMISES = {
    # the pages of optree
    "every other object in it is a *leaf*": LEAVES,
    "| class, exactly | children |": (
        "optree/test_laws.py::test_structure_is_the_one_written_in_the_table"
    ),
    "for every kind of container": (
        "optree/test_torch_client.py::test_compile_without_graph_breaks"
    ),
    "`tree_map_` stops silently": (
        "optree/test_map.py::test_functions_that_map_raise_what_the_function_raises"
    ),
    "the reference of every function": (
        "optree/test_documentation.py::test_the_reference_has_every_public_name"
    ),
    "those below it, never those above": (
        "tools/test_check_layers.py::test_one_forbidden_line_in_optree_is_one_violation"
    ),
    "if all keys are of exactly these types": (
        "optree/test_remembered_keys.py::test_objects_of_yours_are_not_kept"
    ),
    "The exact class of an object decides": LEAVES,
    "A registration applies to the exact class": REGISTERED,
    # its docstrings
    "Objects of exactly this class become nodes": REGISTERED,
    "Replace every leaf by a structure": "optree/test_treespec.py::test_compose",
    # the pages of torchopt
    "a loss after training has exact gradients with respect to": EXACT,
    "long runs of momentum steps that are reversed exactly": REVERSED,
    "It is exact to about 1e-12": REVERSED,
    'with `keep=` or `derivative="mixed"`, which are exact': UNROLLED,
    "Explicit differentiation is exact up to rounding": EXACT,
    "and every hyper-parameter that is a tensor": EXACT,
    "`keep=` of `torchopt.inner_loop` saves memory and stays exact": UNROLLED,
    "the exact gradient of a window of one step": UNROLLED,
    "each rank holds them; never sent": (
        "torchopt/distributed/test_task_parallel.py::"
        "test_a_step_is_one_message_or_as_many_as_there_are_buckets"
    ),
    "every rank ends the step with the same gradient": WORLDS,
    "with look-ahead the exact agents approach": (
        "torchopt/examples/test_lola_dilemma.py::"
        "test_exact_values_equal_the_discounted_sum_over_moves"
    ),
    "LSTM, GRU, RNN | fast kernels have no second derivative": (
        "torchopt/diff/explicit/test_attention.py::test_layers_with_fast_kernels_work_in_every_mode"
    ),
    "`weight_norm` | the norm counts as a constant": (
        "torchopt/diff/test_twice_differentiable.py::test_weight_norm_has_its_second_derivative"
    ),
    "`linear_cross_entropy` in chunks": (
        "torchopt/diff/test_twice_differentiable.py::"
        "test_cross_entropy_in_chunks_is_refused_or_exchanged"
    ),
    "`backward()` in a loss | tangents pass through": (
        "torchopt/diff/explicit/test_constants.py::"
        "test_the_gradient_equals_that_of_the_unrolled_loop"
    ),
    "a hook of a tensor, a node or a module that returns another gradient": (
        "torchopt/diff/explicit/test_hooks.py::test_a_hook_that_changes_a_gradient_is_refused"
    ),
    "the exact vector-Jacobian product from the same source": (
        "torchopt/kernels/test_fused_update.py::test_first_derivative"
    ),
    "gradients of the accelerated Adam with `eps_root` | exact": (
        "torchopt/kernels/test_fused_adam.py::test_first_derivative_equals_that_of_the_reference"
    ),
    "cutting the graph every k steps": (
        "torchopt/optim/test_state_and_memory.py::"
        "test_detach_every_bounds_how_far_a_meta_gradient_reaches"
    ),
    # its docstrings: transformations and optimizers
    "with ``inplace=False`` every input is left untouched": (
        "torchopt/optim/test_parity.py::test_functional_steps_leave_their_inputs_untouched"
    ),
    "Differentiate the coefficient too, so that meta-gradients are exact": WRAPPED,
    "It is exact wherever no element of u or g is zero": WRAPPED,
    "The derivative is exact, also through Q": WRAPPED,
    "The derivative is exact, also through epsilon": WRAPPED,
    "The derivative is exact, also through d": FIRST,
    "The derivative is exact for constant probes": FIRST,
    "exact to any order, also through the bases": SECOND,
    "After every k-th step": "torchopt/transform/test_combinators.py::test_lookahead_by_hand",
    "Every update advances it": (
        "torchopt/transform/test_noise_and_curvature.py::"
        "test_noise_advances_its_generator_in_each_step"
    ),
    "Detach parameters and states after every `detach_every` steps": (
        "torchopt/optim/test_state_and_memory.py::"
        "test_detach_every_bounds_how_far_a_meta_gradient_reaches"
    ),
    "act on its gradient in every step": (
        "torchopt/optim/test_parameters.py::test_hooks_act_in_every_step_and_on_no_other_gradient"
    ),
    # its docstrings: engines and solvers
    "Called with a `GradientReport` for every gradient": REPORTS,
    "where g is the gradient at the exact root": (
        "torchopt/diff/implicit/test_certificate.py::test_ridge_report_is_exact"
    ),
    "For a linear T it is equivalent to GMRES, and exact after": (
        "torchopt/solvers/test_solvers.py::test_anderson_on_a_linear_map_is_exact_after_n_steps"
    ),
    "differentiable with respect to every tensor in args": (
        "torchopt/solvers/test_solvers.py::test_cube_root_to_second_order_in_every_mode"
    ),
    "Its derivatives, to any order and in every mode, follow": PROGRAMS,
    "every part is differentiable": PROGRAMS,
    "so the solution is exact up to rounding": (
        "torchopt/solvers/test_quadratic_program.py::"
        "test_equality_constraints_are_one_linear_system"
    ),
    "differentiable with respect to p, in every mode and to any order": (
        "torchopt/linear_solve/test_solvers.py::test_nested_transforms_agree_with_torch_solve"
    ),
    "Under `torch.func.vmap` nothing is remembered, and every solve starts cold": (
        "torchopt/linear_solve/test_solvers.py::test_under_vmap_a_warm_start_remembers_nothing"
    ),
    "if `restart` is at least n, the first cycle is exact": (
        "torchopt/linear_solve/test_solvers.py::"
        "test_restarted_gmres_takes_as_many_cycles_as_by_definition"
    ),
    "exact for direct solvers, a lower bound for Krylov solvers": (
        "torchopt/linear_solve/test_solvers.py::test_condition_number_from_the_coefficients"
    ),
    "the derivatives are those of the exact solution": (
        "torchopt/linear_solve/test_closures.py::test_linalg_cg_is_differentiable_in_the_matrix"
    ),
    "restore every bit on exit": (
        "torchopt/diff/zero_order/test_seed_replay.py::test_every_bit_is_restored_whatever_happens"
    ),
    "g = 1/N sum_i c_i z_i is never stored": (
        "torchopt/diff/zero_order/test_seed_replay.py::test_a_large_model_is_drawn_leaf_by_leaf"
    ),
    "exact for polynomials of degree 2m along a line": (
        "torchopt/diff/zero_order/test_estimators.py::test_multi_point_is_exact_for_polynomials"
    ),
    "The gradient is exact.": "torchopt/test_second_order.py::test_the_compiled_program_is_exact",
    "It covers every tensor among the arguments that requires one": COMPILED,
    "every intermediate value and gradient is compared": (
        "torchopt/params/test_doctor.py::test_the_operation_whose_derivative_is_wrong_is_named"
    ),
    "silently returns the gradients of another function": (
        "torchopt/params/test_functional.py::test_gradients_under_checkpointing_are_those_without"
    ),
    "those of functions written in Python are always drawn": (
        "torchopt/visual/test_visual.py::test_functions_written_in_python_always_show_what_they_saved"
    ),
    # its docstrings: several processes
    "adds the same gradient to .grad on every rank": WORLDS,
    "Every task sees the parameters as they are at the beginning": (
        "torchopt/distributed/test_undo.py::"
        "test_tasks_that_adapt_parameters_in_place_are_equal_at_every_world_size"
    ),
    "the error is raised on every rank, and `.grad` and modules": (
        "torchopt/distributed/test_undo.py::test_everything_that_a_failed_task_changed_is_restored"
    ),
    "raised on every rank.": (
        "torchopt/distributed/test_unusual.py::"
        "test_an_estimate_that_fails_on_one_rank_raises_on_all"
    ),
    "So one script works with every backend": BACKENDS,
    "with the collective backend it is every rank": BACKENDS,
    "With the collective backend every rank makes the same call": RESULTS,
    "every rank gets all results, and the future is already complete": RESULTS,
    "Splits every tensor in the arguments along one dimension": (
        "torchopt/distributed/test_published_names.py::test_partitioners_make_the_published_calls"
    ),
}
FOUND = promises.promises()


@pytest.mark.parametrize("place", FOUND)
def test_a_sentence_without_exception_has_a_test(place: str) -> None:
    untested = [s for s in sorted(FOUND[place]) if not any(part in s for part in PROMISES)]
    assert untested == []


@pytest.mark.parametrize("part", PROMISES)
def test_the_test_of_a_promise_exists(part: str) -> None:
    assert any(part in sentence for sentences in FOUND.values() for sentence in sentences)
    file, _, name = PROMISES[part].partition("::")
    package, _, path = file.partition("/")
    assert f"def {name}(" in (ROOT / FOLDERS[package] / path).read_text(encoding="utf-8")


def test_which_sentences_are_promises() -> None:
    page = "It never fails. It may.\nIt is `exact`.\n```python\nevery = 1\n```\n"
    assert promises.of_page(page) == ["It never fails. It may."]
    docstring = """Return x.

    It is exact, with `every`
    word. It may fail.

    Args:
        every: A number.

    Example:
        >>> always(1)
        exactly

    References:
        A, Exact Methods, 2000.
    """
    assert promises.of_docstring(docstring) == ["It is exact, with `every` word."]
