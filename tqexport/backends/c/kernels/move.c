/* The same values on another grid. */
static void move(const factor *by, const int8_t *input, int8_t *output, int32_t count, const grid *source,
                 const grid *target)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        output[i] = to_level(scaled(input[i] - source->zero, by->multiplier, by->exponent), target);
    }
}
