#include "thread_count.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

namespace helexa {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Processors that a group's own quota is worth; 0: none, or the file is not there.
double group_quota(const std::string& folder, bool version_2) {
  double quota = 0, period = 0;
  if (version_2) {
    std::istringstream(first_line(folder + "/cpu.max")) >> quota >> period;  // "max" is no number
  } else {
    std::istringstream(first_line(folder + "/cpu.cfs_quota_us")) >> quota;  // -1: none
    std::istringstream(first_line(folder + "/cpu.cfs_period_us")) >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// The smallest quota of the group `path` and of those above it, up to the mount point.
double least_quota(const std::string& mount, std::string path, bool version_2) {
  double least = 0;
  for (;;) {
    const double quota = group_quota(mount + path, version_2);
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
    if (path.empty()) return least;
    path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
}

}  // namespace

std::vector<int> physical_cores(const std::string& root, const std::vector<int>& allowed) {
  std::set<std::string> seen;  // the same text for all processors of a core
  std::vector<int> cores;
  for (const int cpu : allowed) {
    const std::string name = std::to_string(cpu);
    std::string siblings = first_line(root + "/sys/devices/system/cpu/cpu" + name + "/topology/core_cpus_list");
    if (siblings.empty())  // before Linux 5.3
      siblings = first_line(root + "/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list");
    if (seen.insert(siblings.empty() ? name : siblings).second) cores.push_back(cpu);
  }
  return cores;
}

int quota_processors(const std::string& root) {
  const std::string mount = root + "/sys/fs/cgroup";
  double least = 0;
  const auto consider = [&](double quota) {
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
  };
  consider(group_quota(mount, true));
  consider(group_quota(mount + "/cpu", false));
  // Lines of "number:controllers:path"; number 0 and no controllers is version 2. In a container paths may lie outside
  // of what is mounted: then nothing is found there.
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    if (controllers == ",,") consider(least_quota(mount, path, true));
    if (controllers.find(",cpu,") != std::string::npos) consider(least_quota(mount + "/cpu", path, false));
  }
  return least > 0 ? std::max(1, int(least + 0.5)) : 0;
}

int threads_for(const std::string& root, const std::vector<int>& allowed) {
  int threads = int(physical_cores(root, allowed).size());
  if (threads == 0) threads = int(std::thread::hardware_concurrency());
  const int quota = quota_processors(root);
  return std::max(1, quota > 0 ? std::min(threads, quota) : threads);
}

std::vector<int> allowed_processors() {
  std::vector<int> allowed;
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) allowed.push_back(cpu);
#endif
  return allowed;
}

}  // namespace helexa
