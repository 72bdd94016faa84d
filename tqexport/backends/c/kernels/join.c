/* Puts the channels of a value in their place among all of a joined value. */
static void join(const int8_t *input, int8_t *output, int32_t places, int32_t channels, int32_t first, int32_t all)
{
    int32_t place, channel;
    for (place = 0; place < places; place++) {
        for (channel = 0; channel < channels; channel++) {
            output[place * all + first + channel] = input[place * channels + channel];
        }
    }
}
