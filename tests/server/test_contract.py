"""What helexa promises to the programs that talk to it over HTTP, and the tests that hold each promise.

The rows are those of the project's contract for HTTP clients: routes, streaming, requests, what is special to a wire format, errors.
A row without a test cannot be added, a test that a row names cannot go.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from helexa_server.app import ROUTES

TESTS = Path(__file__).parents[1]

CHAT, COMPLETIONS = "server/test_chat.py", "server/test_completions.py"
RESPONSES, MESSAGES = "server/test_responses.py", "server/test_messages.py"
APP, ROUTES_FILE, METRICS = "server/test_app.py", "server/test_routes.py", "server/test_metrics.py"
WIRE_CHAT, WIRE_COMPLETIONS = "server/wire/test_openai_chat.py", "server/wire/test_openai_completions.py"
WIRE_RESPONSES, WIRE_MESSAGES = "server/wire/test_openai_responses.py", "server/wire/test_anthropic_messages.py"
MODELS, MANAGER = "server/test_model_routes.py", "server/lifecycle/test_manager.py"
CATALOGUE, EVENTS = "server/lifecycle/test_catalogue.py", "server/lifecycle/test_model_events.py"
SERVED = "end_to_end/test_models_over_http.py"
DEMO = "end_to_end/test_demo_over_http.py"
PARSER, STRUCTURED = "engine/text/test_output_parser.py", "engine/text/test_structured.py"
ENGINE = "engine/runtime/test_engine.py"
SCHEDULER, PREFIXES = "engine/runtime/test_scheduler.py", "engine/runtime/test_prefix_reuse.py"
MEMORY = "engine/runtime/test_memory.py"
ADMISSION, ADMITTED = "server/test_admission.py", "end_to_end/test_admission_over_http.py"
TURNS, PROCESSOR = "engine/text/test_messages.py", "engine/text/test_request_processor.py"
AGENTS, CUTS = "server/wire/test_agents.py", "server/wire/test_cuts.py"
CONSTRAINTS, SAMPLING = "end_to_end/test_constraints_over_http.py", "end_to_end/test_sampling_over_http.py"

ROWS: dict[str, list[tuple[str, str]]] = {
    # -- Routes
    "POST /v1/chat/completions": [(CHAT, "test_whole_answer"), (CHAT, "test_stream")],
    "POST /v1/completions": [(COMPLETIONS, "test_whole_and_streamed")],
    "POST /v1/completions: echo and logprobs": [
        (COMPLETIONS, "test_echo_with_logprobs"),
        (DEMO, "test_tokens_round_trip_and_prompt_echo"),
    ],
    "POST /v1/completions: suffix": [(COMPLETIONS, "test_a_suffix_asks_for_the_middle")],
    "POST /v1/responses": [(RESPONSES, "test_whole_answer"), (DEMO, "test_every_wire_gives_the_same_words")],
    "POST /v1/messages": [(MESSAGES, "test_whole_answer"), (DEMO, "test_every_wire_gives_the_same_words")],
    "POST /v1/messages/count_tokens": [(MESSAGES, "test_count_tokens_is_the_prompt_of_the_same_body")],
    "POST /tokenize, /detokenize": [
        (APP, "test_tokenize_and_detokenize"),
        (DEMO, "test_tokens_round_trip_and_prompt_echo"),
    ],
    "POST /apply-template": [(ROUTES_FILE, "test_apply_template_and_tokenize_messages")],
    "GET /v1/models[/{id}]": [(APP, "test_models_and_version"), (ROUTES_FILE, "test_models_in_the_words_of_both")],
    "GET /health (process up), /ready (can serve)": [(APP, "test_while_loading"), (APP, "test_models_and_version")],
    "GET /version": [(APP, "test_models_and_version")],
    "GET /discovery": [(ROUTES_FILE, "test_discovery")],
    "GET /metrics": [(METRICS, "test_requests_are_counted_and_timed")],
    "GET /models": [
        (MODELS, "test_models_says_how_each_is"),
        (MODELS, "test_control_routes_answer_while_a_model_loads"),
    ],
    "POST /models/load, /models/unload": [
        (MODELS, "test_load_and_unload"),
        (MODELS, "test_bad_bodies_and_unknown_names"),
        (MODELS, "test_loading_needs_the_admins_key_where_there_is_one"),
        (SERVED, "test_two_names_one_loaded_on_request_over_http_and_by_command"),
    ],
    "GET /models/events: stage and fraction": [
        (MODELS, "test_events_begin_with_a_snapshot_and_end_with_the_server"),
        (EVENTS, "test_a_picture_first_and_then_every_change"),
    ],
    "POST /v1/requests/{id}/cancel": [(ROUTES_FILE, "test_cancel"), (ROUTES_FILE, "test_cancel_in_mid_stream")],
    "POST /v1/requests/{id}/stop-thinking": [
        (ROUTES_FILE, "test_cancel"),
        (CONSTRAINTS, "test_stop_thinking"),
    ],
    "/v1/embeddings answers 501 with the envelope where the model can't": [
        (ROUTES_FILE, "test_embeddings_are_not_implemented_and_not_repeated")
    ],
    "Unknown body fields are ignored": [
        (WIRE_CHAT, "test_unknown_fields_are_ignored"),
        (WIRE_RESPONSES, "test_unknown_fields_are_ignored"),
        (WIRE_MESSAGES, "test_unknown_fields_are_ignored"),
    ],
    # -- Streaming
    "The role comes with the first real token": [(CHAT, "test_stream"), (CHAT, "test_empty_answer_still_has_a_role")],
    "Every chunk has the same id, created, model": [(CHAT, "test_stream")],
    "Reasoning in reasoning_content; reasoning accepted on input": [
        (CHAT, "test_tools_and_reasoning"),
        (WIRE_CHAT, "test_what_clients_really_send"),
    ],
    "Tool calls: index, id, type, name and empty arguments first, then fragments": [(CHAT, "test_tools_and_reasoning")],
    "Fragments concatenate to valid JSON, while the model writes them, for both Qwen syntaxes": [
        (PARSER, "test_arguments_stream_while_they_are_written"),
        (PARSER, "test_chunking_does_not_matter_and_calls_are_json"),
        (PARSER, "test_no_string_lags_behind_by_more_than_what_may_be_a_tag"),
    ],
    "include_usage: a last chunk with choices: []": [(CHAT, "test_stream")],
    "cached_tokens and reasoning_tokens always; timings": [
        *[(file, "test_whole_answer") for file in (CHAT, RESPONSES, MESSAGES)],
        (CHAT, "test_stream_without_usage_ends_with_timings_then_done"),
    ],
    "After 10 s without bytes: a no-op chunk on chat": [(CHAT, "test_silence_is_filled_with_empty_chunks")],
    "After 10 s without bytes: a chunk that says nothing on completions": [
        (COMPLETIONS, "test_silence_is_filled_with_chunks_that_say_nothing")
    ],
    "After 10 s without bytes: event: ping on messages": [(MESSAGES, "test_silence_is_filled_with_pings")],
    "After 10 s without bytes: an event that changes nothing on responses": [(RESPONSES, "test_silence_is_filled")],
    "Never a total timeout": [(ROUTES_FILE, "test_a_stream_outlasts_every_timeout")],
    "Client gone: aborted in every phase, streaming or not": [
        (CHAT, "test_a_client_that_leaves_aborts_its_request"),
        (COMPLETIONS, "test_a_client_that_leaves_aborts_its_request"),
        (RESPONSES, "test_a_client_that_leaves_aborts_its_request"),
        (MESSAGES, "test_a_client_that_leaves_aborts_its_request"),
        (ENGINE, "test_abort_frees_every_page_in_every_phase"),
    ],
    "A failure in mid-stream is an error event in that wire's own form": [
        (CHAT, "test_error_in_mid_stream_is_an_error_event"),
        (COMPLETIONS, "test_error_in_mid_stream_is_an_error_event"),
        (RESPONSES, "test_error_in_mid_stream_is_an_error_event_and_a_failed_response"),
        (MESSAGES, "test_error_in_mid_stream_is_an_error_event"),
    ],
    "Streamed content, joined, equals the non-streamed answer: over every cut of its bytes": [
        (CUTS, "test_the_joined_stream_is_the_whole_answer_wherever_tokens_end")
    ],
    "Streamed content, joined, equals the non-streamed answer": [
        (file, "test_joined_stream_equals_the_whole_answer")
        for file in (WIRE_CHAT, WIRE_COMPLETIONS, WIRE_RESPONSES, WIRE_MESSAGES)
    ],
    # -- Requests
    "max_tokens and its other names; absent means the rest of the context": [
        (WIRE_CHAT, "test_sampling_fields"),
        (WIRE_RESPONSES, "test_settings"),
        (WIRE_MESSAGES, "test_unknown_fields_are_ignored"),
    ],
    "max_tokens too large is clamped": [(ENGINE, "test_max_tokens_is_clamped_to_the_context")],
    "A prompt over the context is 400 context_length_exceeded with the words agents look for": [
        (ENGINE, "test_a_prompt_over_the_context_is_refused_with_the_words_agents_look_for"),
        (DEMO, "test_a_prompt_over_the_context"),
        (MESSAGES, "test_errors_before_the_answer"),
    ],
    "stop; n; seed; logit_bias; penalties; min_p, top_k, ignore_eos, min_tokens": [
        (WIRE_CHAT, "test_sampling_fields"),
        (CHAT, "test_several_answers"),
        (SAMPLING, "test_stop_strings_and_stop_tokens"),
        (SAMPLING, "test_n_answers_differ_and_the_seed_repeats_them"),
        (SAMPLING, "test_logit_bias_forbids_and_forces"),
        (SAMPLING, "test_penalties_keep_from_repeating"),
        (SAMPLING, "test_temperature_zero_is_the_likeliest_and_top_k_and_top_p_and_min_p_come_down_to_it"),
        (SAMPLING, "test_ends_of_turn_are_ignored_or_put_off"),
    ],
    "logprobs, top_logprobs": [
        (CHAT, "test_logprobs"),
        (SAMPLING, "test_logprobs"),
        (WIRE_RESPONSES, "test_logprobs_go_with_their_text"),
    ],
    "tool_choice none, auto, required, named": [
        (CONSTRAINTS, "test_no_calls_where_the_client_wants_none"),
        (CONSTRAINTS, "test_a_named_call_whatever_the_model_would_say"),
        (WIRE_CHAT, "test_tool_choice"),
        (WIRE_RESPONSES, "test_settings"),
        (WIRE_MESSAGES, "test_tool_choice"),
    ],
    "parallel_tool_calls": [
        (CONSTRAINTS, "test_required_calls_may_be_several_unless_the_client_says_no"),
        *[(file, "test_one_call_when_parallel_calls_are_off") for file in (CHAT, RESPONSES, MESSAGES)],
    ],
    "response_format json_object and json_schema, llama.cpp's schema, regex, grammar": [
        (WIRE_CHAT, "test_structured_output"),
        (CONSTRAINTS, "test_formats"),
        (WIRE_RESPONSES, "test_text_format"),
        (MESSAGES, "test_structured_output"),
    ],
    "A schema keyword that cannot be enforced is a 400 that names it": [
        (STRUCTURED, "test_unsupported_is_named"),
        (CONSTRAINTS, "test_what_a_schema_cannot_be_held_to_is_a_400_that_names_it"),
    ],
    "A thinking budget": [(CONSTRAINTS, "test_thinking_budget"), (WIRE_CHAT, "test_thinking_budget")],
    "reasoning_effort, chat_template_kwargs": [
        (WIRE_CHAT, "test_thinking"),
        (WIRE_RESPONSES, "test_settings"),
        (WIRE_MESSAGES, "test_thinking"),
    ],
    "Structured output and forced calls are enforced by grammar": [
        (STRUCTURED, "test_forced_tool_calls"),
        (DEMO, "test_json_on_request"),
        (DEMO, "test_a_forced_call_and_its_result_through_each_wire"),
    ],
    "Calls that the model makes of its own accord are held to the schema once they are opened": [
        (STRUCTURED, "test_a_call_once_opened_is_held_to_the_schema_and_the_text_around_it_is_free"),
        (STRUCTURED, "test_a_schema_beyond_the_compiler_leaves_its_tool_free_and_only_that"),
        (CONSTRAINTS, "test_a_call_of_the_models_own_accord_is_held_to_the_schema"),
    ],
    "The grammar begins after </think>": [(STRUCTURED, "test_grammar_begins_after_thinking")],
    "Images on a text model are 400 vision_unsupported": [
        (WIRE_CHAT, "test_an_image_is_refused_by_its_own_code"),
        (WIRE_RESPONSES, "test_an_image_is_refused_by_its_own_code"),
        (WIRE_MESSAGES, "test_what_is_no_text_is_refused_by_its_own_code"),
    ],
    # -- Message normalisation
    "Templates are probed once at load": [(PROCESSOR, "test_templates_are_probed_when_the_model_is_loaded")],
    "developer is system; content null is allowed; the billing header is dropped": [
        (TURNS, "test_reading"),
        (TURNS, "test_a_message_that_is_only_the_billing_header_is_dropped"),
    ],
    "Leading system messages merge; later ones are turned in place when the template refuses them, never hoisted": [
        (TURNS, "test_fitting"),
        (TURNS, "test_what_comes_later_changes_nothing_before_it"),
    ],
    "Same-role turns merge when the template demands it": [(TURNS, "test_a_template_that_demands_turns_gets_them")],
    "String tool arguments become objects": [(TURNS, "test_arguments_become_objects")],
    "Unknown content blocks and hosted tool types are skipped with one log line": [
        (TURNS, "test_unknown_parts_cost_one_line_a_request"),
        (WIRE_CHAT, "test_unknown_parts_and_hosted_tools_are_skipped_with_a_log_line"),
        (AGENTS, "test_all_that_was_said_is_in_the_prompt"),
    ],
    "Old reasoning is kept or dropped as the template says, stably": [
        (AGENTS, "test_each_prompt_begins_with_the_one_before")
    ],
    # -- Responses
    "Responses: typed items or a plain string; instructions; calls, their output, reasoning items": [
        (WIRE_RESPONSES, "test_an_agents_session"),
        (RESPONSES, "test_tools_and_reasoning_whole_and_streamed"),
    ],
    "Responses: type and sequence_number; the full order of events": [
        (RESPONSES, "test_stream_in_the_full_order"),
        (WIRE_RESPONSES, "test_joined_stream_equals_the_whole_answer"),
    ],
    "Responses: store is accepted and false": [(RESPONSES, "test_whole_answer")],
    "Responses: previous_response_id is a 400 in the envelope": [(RESPONSES, "test_previous_response_id_is_refused")],
    "Responses: input_tokens_details and output_tokens_details always": [(RESPONSES, "test_whole_answer")],
    "Responses: text.format json_schema, read by the client's parser": [(RESPONSES, "test_parse")],
    # -- Messages
    "Messages: x-api-key or bearer": [(MESSAGES, "test_errors_raised_before_the_wire_is_known")],
    "Messages: system as string or blocks, without the billing header": [
        (MESSAGES, "test_whole_answer"),
        (WIRE_MESSAGES, "test_an_agents_session"),
        (WIRE_MESSAGES, "test_the_billing_header_alone_is_no_system_prompt"),
    ],
    "Messages: thinking, stop_sequences, tool_choice, metadata, cache_control accepted": [
        (MESSAGES, "test_whole_answer"),
        (WIRE_MESSAGES, "test_thinking"),
        (WIRE_MESSAGES, "test_tool_choice"),
    ],
    "Messages: tool_use, tool_result, thinking blocks both ways, streaming and not": [
        (MESSAGES, "test_tools_and_thinking_whole_and_streamed"),
        (WIRE_MESSAGES, "test_an_agents_session"),
        (DEMO, "test_a_forced_call_and_its_result_through_each_wire"),
    ],
    "Messages: message_start carries input tokens and cache_read_input_tokens": [(MESSAGES, "test_stream")],
    "Messages: errors in Anthropic's envelope with its own type words": [
        (MESSAGES, "test_errors_before_the_answer"),
        (MESSAGES, "test_errors_raised_before_the_wire_is_known"),
        (MESSAGES, "test_a_model_that_is_still_loading_is_overloaded"),
    ],
    "Messages: count_tokens is exact": [
        (DEMO, "test_every_wire_gives_the_same_words"),
        (DEMO, "test_a_forced_call_and_its_result_through_each_wire"),
    ],
    # -- Errors
    "400 invalid_request with the path": [
        (APP, "test_every_error_is_the_envelope"),
        (CHAT, "test_bad_parameter_names_its_path"),
        (WIRE_RESPONSES, "test_bad_fields_are_named"),
        (WIRE_MESSAGES, "test_bad_fields_are_named"),
    ],
    "404 model_not_found": [(CHAT, "test_unknown_model")],
    "422 model_does_not_fit": [
        (APP, "test_a_load_that_failed_is_told"),
        (MANAGER, "test_what_can_never_fit_beside_the_pinned_is_told_at_once_with_the_bytes"),
        (MODELS, "test_load_and_unload"),
    ],
    "422 template_render_failed": [(CHAT, "test_error_before_the_first_token_has_its_status")],
    "401 invalid_api_key": [(APP, "test_api_key"), (ROUTES_FILE, "test_a_file_of_keys_and_an_admin_key")],
    "429 rate_limit_exceeded with Retry-After: queue full, waited too long": [
        (CHAT, "test_error_before_the_first_token_has_its_status"),
        (ADMISSION, "test_a_full_queue_is_told_in_the_wires_own_form"),
        (ADMISSION, "test_retry_after_is_the_queue_at_the_measured_rates"),
        (ADMITTED, "test_who_gets_no_seat_in_time_is_told_when_to_come_back"),
    ],
    "429 rate_limit_exceeded with Retry-After: rate window, one key's share": [
        (ADMISSION, "test_a_key_that_asks_too_fast"),
        (ADMISSION, "test_a_key_has_its_share_of_the_places"),
    ],
    "429 insufficient_quota; never 402": [
        (ADMISSION, "test_a_key_whose_tokens_are_used_up"),
        ("server/test_openapi.py", "test_nothing_is_answered_with_402"),
    ],
    "Silence while a request waits for its turn": [
        (ADMITTED, "test_who_waits_for_a_seat_gets_keep_alives_and_then_its_answer")
    ],
    "503 service_unavailable with Retry-After: loading, draining": [
        (APP, "test_while_loading"),
        (APP, "test_shutdown_is_bounded_and_says_so"),
        (MANAGER, "test_a_load_that_takes_longer_than_a_request_waits"),
        (MANAGER, "test_a_model_in_use_is_waited_for_and_never_evicted"),
        (MODELS, "test_running_requests_end_with_words_when_their_model_is_unloaded"),
    ],
    "500 engine_died, and the model is already coming back": [
        (CHAT, "test_error_before_the_first_token_has_its_status"),
        ("end_to_end/test_worker_faults.py", "test_kill_in_decode"),
        ("server/lifecycle/test_model_life.py", "test_what_dies_is_loaded_again"),
    ],
    "A request for a model that is loading waits, with keep-alives": [
        (APP, "test_a_request_waits_for_the_load"),
        (MODELS, "test_a_request_for_an_unloaded_model_waits_for_its_load_with_keep_alives"),
    ],
    # -- Several models
    "Lifecycle: aliases, pins, idle times, eviction by least recent use under a budget": [
        (MODELS, "test_an_alias_answers_under_the_models_own_name"),
        (CATALOGUE, "test_each_name_stands_for_one_model"),
        (MANAGER, "test_pinned_models_stay"),
        (MANAGER, "test_an_idle_model_is_unloaded_after_its_time"),
        (MANAGER, "test_the_least_recently_used_model_makes_room"),
        (MANAGER, "test_two_loads_in_a_row_without_memory_for_both"),
    ],
    "Hazard 20: load is single-flight per model": [
        (MANAGER, "test_a_request_for_an_unloaded_model_loads_it_once_for_all_who_wait")
    ],
    "Hazard 16: a control-plane call never waits for the device": [
        (MODELS, "test_control_routes_answer_while_a_model_loads")
    ],
    # -- Hazards of memory and of many clients
    "Hazard 11: bytes are accounted for and reserved before loading": [
        (MEMORY, "test_states_are_reserved_for_every_seat"),
        (MEMORY, "test_weights_that_do_not_fit_say_by_how_much"),
        (SCHEDULER, "test_every_request_ends_and_no_page_or_slot_is_lost"),
    ],
    "Hazard 12: admitted by pages, not by count": [
        (SCHEDULER, "test_a_request_that_waits_for_pages_lets_three_pass_and_then_holds_back_the_others"),
        (ADMISSION, "test_a_model_holds_as_many_answers_as_it_has_seats_and_the_queue_more"),
        (ADMITTED, "test_a_prompt_that_can_never_fit_is_refused_at_once"),
    ],
    "Hazard 13: the reservation before the seat": [
        (SCHEDULER, "test_a_stream_of_urgent_requests_starves_nobody"),
        (SCHEDULER, "test_every_request_ends_and_no_page_or_slot_is_lost"),
    ],
    "Hazard 14: cached pages are free space": [(PREFIXES, "test_cached_pages_are_free_space_for_whoever_comes")],
    "Hazard 19: a client that leaves frees its place, pages and slot in every phase": [
        (SCHEDULER, "test_an_aborted_sequence_is_gone_before_the_next_step"),
        (PREFIXES, "test_abort_in_every_phase_leaves_nothing_held"),
        (ADMISSION, "test_a_client_that_leaves_frees_its_place"),
        (ADMITTED, "test_who_leaves_the_queue_is_gone_from_the_engine"),
    ],
    "Hazard 24: a saturated engine still answers its health check": [
        (ADMITTED, "test_a_saturated_engine_still_answers_its_health_check")
    ],
    "Hazard 27: one failed sample fails one request": [
        (ENGINE, "test_one_failed_sample_fails_one_request_and_never_the_batch")
    ],
    # -- Around them
    "Keys: none, one, a file of keys, an admin key": [
        ("server/test_server_config.py", "test_keys_from_files"),
        (ROUTES_FILE, "test_a_file_of_keys_and_an_admin_key"),
    ],
    "CORS for localhost": [(ROUTES_FILE, "test_local_pages_may_ask"), (ROUTES_FILE, "test_other_pages_may_not")],
    "A loopback server answers to its own names": [
        (ROUTES_FILE, "test_a_page_of_another_name_is_refused"),
        (ROUTES_FILE, "test_names_behind_a_proxy_are_configured"),
    ],
    "Bodies and headers have a limit": [
        (APP, "test_every_error_is_the_envelope"),
        (ROUTES_FILE, "test_headers_have_a_limit"),
    ],
    "Back-pressure of slow clients is bounded": [
        (ROUTES_FILE, "test_a_client_that_reads_nothing_is_bounded_and_then_left"),
        (ROUTES_FILE, "test_a_client_that_reads_slowly_gets_everything"),
    ],
    "One line of log per request": [
        (ROUTES_FILE, "test_one_log_line_for_every_request_but_probes"),
        (CHAT, "test_one_log_line_a_request"),
    ],
    "Request ids are echoed": [(ROUTES_FILE, "test_request_ids_are_echoed")],
    "/openapi.json says what the server does": [
        ("server/test_openapi.py", "test_nothing_sent_brings_an_undescribed_status_or_a_fault")
    ],
}


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_its_tests(row: str) -> None:
    assert ROWS[row]
    for file, test in ROWS[row]:
        assert test in names_in(file), f"{file} has no {test}"


def test_every_route_has_a_row() -> None:
    rows = " ".join(ROWS)
    for route in ROUTES:
        path = route.path.partition("/{")[0]
        assert path in rows, f"no row names {route.path}"
