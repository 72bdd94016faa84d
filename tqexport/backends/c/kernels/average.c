/* The mean over all places, for each channel. */
static void average(const factor *by, const int8_t *input, int8_t *output, int32_t places, int32_t channels,
                    const grid *source, const grid *target)
{
    int32_t channel, place;
    for (channel = 0; channel < channels; channel++) {
        int32_t sum = 0;
        for (place = 0; place < places; place++) {
            sum += input[place * channels + channel] - source->zero;
        }
        output[channel] = to_level(scaled(sum, by->multiplier, by->exponent), target);
    }
}
