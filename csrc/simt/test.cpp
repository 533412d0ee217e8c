// The program that runs the tests: tests [--seed N] [--seeds COUNT] [NAME...], or tests --list. It prints the kernels
// that were launched.

#include "simt/test.h"

#include <algorithm>
#include <cstdio>

extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
extern "C" const char* __tsan_default_options() { return "halt_on_error=1:report_thread_leaks=0"; }
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }

namespace simt {
namespace {

std::string text(double x) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.3g", x);
    return digits;
}

}  // namespace

std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

std::mt19937_64& values() {
    static std::mt19937_64 generator;
    return generator;
}

void compare_by_rule(const std::string& what, const std::vector<double>& ours, const std::vector<double>& plain,
                     const std::vector<double>& reference, double epsilon, bool is_double) {
    double largest = 0, our_worst = 0, plain_worst = 0, our_squares = 0, plain_squares = 0;
    for (std::size_t i = 0; i < ours.size(); ++i) {
        expect(std::isfinite(ours[i]), what + "[" + std::to_string(i) + "] is not finite");
        const double our_error = std::fabs(ours[i] - reference[i]), plain_error = std::fabs(plain[i] - reference[i]);
        largest = std::max(largest, std::fabs(reference[i]));
        our_worst = std::max(our_worst, our_error);
        plain_worst = std::max(plain_worst, plain_error);
        our_squares += our_error * our_error;
        plain_squares += plain_error * plain_error;
    }
    const double floor = (is_double ? 128 * epsilon : 2 * std::max(epsilon, 5e-6)) * (1 + largest);
    const double allowed = 3 * plain_worst + floor;
    expect(our_worst <= allowed,
           what + ": largest error " + text(our_worst) + ", allowed " + text(allowed));
    const double count = static_cast<double>(std::max<std::size_t>(ours.size(), 1));
    const double rms = std::sqrt(our_squares / count), plain_rms = std::sqrt(plain_squares / count);
    expect(rms <= floor / 2 || rms <= 1.5 * plain_rms,
           what + ": RMS error " + text(rms) + ", plain " + text(plain_rms));
}

}  // namespace simt

int main(int count, char** words) {
    unsigned long seed = 0, seeds = 1;
    std::vector<std::string> names;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word == "--list") {
            for (const simt::Test& test : simt::tests()) std::printf("%s\n", test.name.c_str());
            return 0;
        }
        if (word == "--seed" && i + 1 < count) seed = std::strtoul(words[++i], nullptr, 10);
        else if (word == "--seeds" && i + 1 < count) seeds = std::strtoul(words[++i], nullptr, 10);
        else names.push_back(word);
    }
    std::size_t found = 0;
    for (const simt::Test& test : simt::tests()) {
        if (!names.empty() && std::find(names.begin(), names.end(), test.name) == names.end()) continue;
        ++found;
        for (unsigned long now = seed; now < seed + seeds; ++now) {
            simt::set_seed(now);
            simt::values().seed(now);
            try {
                test.body();
            } catch (const std::exception& error) {
                std::fprintf(stderr, "%s failed (--seed %lu): %s\n", test.name.c_str(), now, error.what());
                return 1;
            }
        }
    }
    for (const std::string& kernel : simt::kernels_launched()) std::printf("kernel %s\n", kernel.c_str());
    if (found < std::max<std::size_t>(names.size(), 1)) {
        std::fprintf(stderr, "%zu tests have the names given; --list shows all\n", found);
        return 2;
    }
    return 0;
}
