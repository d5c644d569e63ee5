#pragma once

namespace helexa::simt_test {

void run_sums(const float* x, float* out, int blocks);
void run_faulty(const float* x, float* out, int which);
void run_multiply(const void* a, const void* b, void* c, bool is_int8);

}  // namespace helexa::simt_test
