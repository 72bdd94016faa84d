/* The product of a window with the codes of one output channel, a byte each, which are shifted as they are read. */
static int32_t times_codes(const int16_t *window, const uint8_t *codes, int32_t channel, int32_t size, int32_t shift)
{
    const uint8_t *const end = (codes += channel * size) + size;
    int32_t sum = 0;
    while (codes < end) {
        sum += (int32_t)*window++ * (int16_t)(*codes++ >> shift);
    }
    return sum;
}
