/* The product of a window with the int8 weights of one output channel. */
static int32_t times_weights(const int16_t *window, const int8_t *weights, int32_t size)
{
    const int8_t *const end = weights + size;
    int32_t sum = 0;
    while (weights < end) {
        sum += (int32_t)*window++ * (int16_t)*weights++;
    }
    return sum;
}
