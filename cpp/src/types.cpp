// Names of quantizers, grids, layouts and prologues, in both directions.
#include "quest/types.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <iomanip>
#include <locale>
#include <numeric>
#include <vector>

#include "quest/check.h"
#include "quest/grid.h"

namespace quest {
namespace {

constexpr std::string_view kOriginal = "-original";
constexpr std::string_view kFourEight = "4:8-";

template <typename T>
struct Name {
  std::string_view text;
  T value;
};

// int_zero before int: the first name that begins the text is taken.
constexpr std::array<Name<GridKind>, 5> kGrids = {{{"int_zero", GridKind::kIntZero},
                                                   {"int", GridKind::kInt},
                                                   {"fp4", GridKind::kFp4},
                                                   {"gauss", GridKind::kGauss},
                                                   {"ternary", GridKind::kTernary}}};
constexpr std::array<Name<Rotation>, 2> kRotations = {{{"none", Rotation::kNone}, {"hadamard", Rotation::kHadamard}}};
constexpr std::array<Name<Estimator>, 3> kEstimators = {
    {{"trust", Estimator::kTrust}, {"clip", Estimator::kClip}, {"ste", Estimator::kSte}}};
constexpr std::array<Name<Layout>, 5> kLayouts = {{{"codes", Layout::kCodes},
                                                   {"values", Layout::kValues},
                                                   {"packed", Layout::kPacked},
                                                   {"planes", Layout::kPlanes},
                                                   {"even_odd", Layout::kEvenOdd}}};
constexpr std::array<Name<PrologueKind>, 3> kPrologues = {
    {{"none", PrologueKind::kNone}, {"rms_norm", PrologueKind::kRmsNorm}, {"silu_mul", PrologueKind::kSiluMul}}};

bool starts_with(std::string_view text, std::string_view prefix) { return text.substr(0, prefix.size()) == prefix; }

bool ends_with(std::string_view text, std::string_view suffix) {
  return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

// Levenshtein distance, for naming the word that was probably meant.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0]++;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t substituted = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({row[j] + 1, diagonal + 1, substituted});
    }
  }
  return row.back();
}

template <typename T, size_t N>
[[noreturn]] void unknown(std::string_view what, std::string_view got, const std::array<Name<T>, N>& names) {
  std::string expected;
  std::string_view nearest = names[0].text;
  for (const auto& name : names) {
    expected += concat(expected.empty() ? "" : ", ", name.text);
    if (edit_distance(got, name.text) < edit_distance(got, nearest)) nearest = name.text;
  }
  throw Error(concat(what, ": expected one of ", expected, ", got \"", got, "\"; did you mean \"", nearest, "\"?"));
}

template <typename T, size_t N>
T parse_name(std::string_view what, std::string_view text, const std::array<Name<T>, N>& names) {
  for (const auto& name : names) {
    if (text == name.text) return name.value;
  }
  unknown(what, text, names);
}

template <typename T, size_t N>
std::string_view name_of(T value, const std::array<Name<T>, N>& names) {
  return std::find_if(names.begin(), names.end(), [&](const auto& name) { return name.value == value; })->text;
}

// The shortest decimal that reads back as the same float.
std::string float_text(float value) {
  for (int precision = 1;; ++precision) {
    std::ostringstream out;
    out.imbue(std::locale::classic());
    out << std::setprecision(precision) << value;
    float back = 0;
    std::istringstream in(out.str());
    in.imbue(std::locale::classic());
    if ((in >> back && back == value) || precision == std::numeric_limits<float>::max_digits10) return out.str();
  }
}

float parse_bound(std::string_view quantizer, std::string_view text) {
  std::istringstream in{std::string(text)};
  in.imbue(std::locale::classic());
  float value = 0;
  in >> value;
  check(!in.fail() && in.peek() == std::istringstream::traits_type::eof() && value > 0, "quantizer \"", quantizer,
        "\": expected a positive number as the estimator's bound, got \"", text, "\"; write, for example, clip1.3");
  return value;
}

}  // namespace

Grid parse_grid(std::string_view text) {
  for (const auto& name : kGrids) {
    if (!starts_with(text, name.text)) continue;
    std::string_view digits = text.substr(name.text.size());
    Grid grid{name.value, 0};
    if (grid.kind == GridKind::kFp4) grid.bits = 4;
    if (grid.kind == GridKind::kTernary) grid.bits = 2;
    if (grid.bits != 0) {
      check(digits.empty(), "grid: expected \"", name.text, "\" with no bits, got \"", text, "\"; remove \"", digits, "\"");
      return grid;
    }
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), grid.bits);
    check(error == std::errc() && end == digits.data() + digits.size(), "grid: expected a number of bits after \"", name.text, "\", got \"",
          text, "\"; write, for example, ", name.text, "4");
    check_grid(grid);
    return grid;
  }
  const size_t letters = text.find_first_of("0123456789");
  unknown("grid", letters == 0 ? text : text.substr(0, letters), kGrids);
}

Layout parse_layout(std::string_view text) { return parse_name("layout", text, kLayouts); }

PrologueKind parse_prologue(std::string_view text) { return parse_name("prologue", text, kPrologues); }

Quantizer parse_quantizer(std::string_view text) {
  const std::string what = concat("quantizer \"", text, "\"");
  // The next part, up to a dash. The last part is not cut: a bound may be 1e-05.
  std::string_view rest = text;
  const auto next = [&](const char* part) {
    const size_t dash = rest.find('-');
    check(dash != std::string_view::npos, what, ": expected ", part,
          " and more parts after it; the form is GRID[BITS]-ROTATION[-4:8]-ESTIMATOR[BOUND][-original], for example int4-hadamard-trust");
    const std::string_view head = rest.substr(0, dash);
    rest.remove_prefix(dash + 1);
    return head;
  };
  Quantizer quantizer;
  const std::string_view grid = next("a grid");
  try {
    quantizer.grid = parse_grid(grid);
  } catch (const Error& error) {
    throw Error(concat(what, ": ", error.what()));
  }
  quantizer.rotation = parse_name(what + ": rotation", next("a rotation"), kRotations);
  if (starts_with(rest, kFourEight)) {
    quantizer.sparsity = Sparsity::kFourEight;
    rest.remove_prefix(kFourEight.size());
  }
  if (ends_with(rest, kOriginal)) {
    quantizer.original = true;
    rest.remove_suffix(kOriginal.size());
  }
  for (const auto& name : kEstimators) {
    if (!starts_with(rest, name.text)) continue;
    quantizer.estimator = name.value;
    rest.remove_prefix(name.text.size());
    if (rest.empty()) return quantizer;
    check(name.value != Estimator::kSte, what, ": expected nothing after ste, which has no bound, got \"", rest, "\"; remove it");
    quantizer.bound = parse_bound(text, rest);
    return quantizer;
  }
  unknown(what + ": estimator", rest, kEstimators);
}

std::string to_string(Grid grid) {
  const std::string_view name = name_of(grid.kind, kGrids);
  const bool has_bits = grid.kind != GridKind::kFp4 && grid.kind != GridKind::kTernary;
  return has_bits ? concat(name, grid.bits) : std::string(name);
}

std::string to_string(Layout layout) { return std::string(name_of(layout, kLayouts)); }

std::string to_string(PrologueKind prologue) { return std::string(name_of(prologue, kPrologues)); }

std::string to_string(const Quantizer& quantizer) {
  return concat(to_string(quantizer.grid), "-", name_of(quantizer.rotation, kRotations), "-",
                quantizer.sparsity == Sparsity::kFourEight ? kFourEight : "", name_of(quantizer.estimator, kEstimators),
                std::isnan(quantizer.bound) ? "" : float_text(quantizer.bound), quantizer.original ? kOriginal : "");
}

}  // namespace quest
