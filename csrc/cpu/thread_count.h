// How many threads the machine has room for, and where: read from /sys, /proc and the affinity mask.
#pragma once

#include <string>
#include <vector>

namespace helexa {

// One processor of each physical core among `allowed`, in their order: what shares a core shares its units and its
// caches, and a second thread there gains nothing. A processor whose siblings cannot be read counts as a core. Files
// are read under `root`, "" for the machine's own.
std::vector<int> physical_cores(const std::string& root, const std::vector<int>& allowed);

// The processors that the quota of this process's control group and of those above it is worth, rounded to the nearest,
// at least 1; 0 without a quota. Version 2 of the file system (cpu.max) and version 1 (cpu.cfs_quota_us).
int quota_processors(const std::string& root);

// The smaller of the two; at least 1. Memory channels are not asked: only the administrator can read them, and more
// threads than fill them cost decoding nothing and speed up prompts.
int threads_for(const std::string& root, const std::vector<int>& allowed);

// The processors that the affinity mask leaves to the calling thread; none where masks cannot be read.
std::vector<int> allowed_processors();

}  // namespace helexa
