/* A sum of two values on grids of their own, at one width. */
typedef struct {
    int32_t first_multiplier, second_multiplier, sum_multiplier;
    int8_t first_exponent, second_exponent, sum_exponent;
} addition;

static void add(const addition *factors, const int8_t *first, const int8_t *second, int8_t *output, int32_t count,
                const grid *first_grid, const grid *second_grid, const grid *target)
{
    const int32_t headroom = (int32_t)1 << 20;
    int32_t i;
    for (i = 0; i < count; i++) {
        const int32_t a = (first[i] - first_grid->zero) * headroom, b = (second[i] - second_grid->zero) * headroom;
        const int32_t sum = scaled(a, factors->first_multiplier, factors->first_exponent) +
                            scaled(b, factors->second_multiplier, factors->second_exponent);
        output[i] = to_level(scaled(sum, factors->sum_multiplier, factors->sum_exponent), target);
    }
}
